"""What a classifier is, and where its weights come from; knows no training."""
