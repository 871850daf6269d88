"""From ChipData and Classifier to a Run."""
