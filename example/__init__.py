"""The embedded example: its chips and backbone, and the scripts that made them."""
