"""The merge engine over chains of files: request, plan, methods, journal, proof."""
