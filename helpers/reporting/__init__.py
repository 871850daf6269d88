"""Figures and sentences, made from tables that were computed elsewhere."""
