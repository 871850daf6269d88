"""From files on disk to checked chips; knows no model."""
