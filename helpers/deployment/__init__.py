"""A classifier at work: its deployable forms, and what serves them."""
