"""The deployable forms of one classifier, by the runtime that serves them."""
