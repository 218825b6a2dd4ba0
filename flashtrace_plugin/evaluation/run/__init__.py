"""One run: samples x methods x measurements, each a line that survives a kill, in a folder that knows its contents."""
