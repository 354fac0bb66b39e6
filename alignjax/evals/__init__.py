"""Models and their samples -> measured quantities with their uncertainty."""
