"""What a form of a classifier costs."""
