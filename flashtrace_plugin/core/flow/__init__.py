"""Weighted flow through attention and what it is worth: the decomposition behind FlashTrace."""
