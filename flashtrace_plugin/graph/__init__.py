"""The graph of reasoning steps: which step rests on which, and the answer on all of them; see docs/graph.md."""
