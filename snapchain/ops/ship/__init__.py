"""Ship: bring what a destination lacks of an image, and publish a point."""
