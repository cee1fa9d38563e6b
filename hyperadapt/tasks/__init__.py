"""From a task's name or description to its embedding."""
