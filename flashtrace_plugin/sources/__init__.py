"""Which document a sentence comes from, and which message made an agent do it; see docs/sources.md."""
