"""Units of text that people ask about: words, sentences, messages, documents, steps; see docs/sources.md."""
