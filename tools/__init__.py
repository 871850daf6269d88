"""Commands of the project that no notebook needs."""
