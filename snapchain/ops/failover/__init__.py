"""Failover: a destination's host takes a guest over whose host is gone, at the last point that is whole."""
