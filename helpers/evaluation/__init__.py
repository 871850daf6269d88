"""What a Run is worth."""
