"""The live page: write or paste a text, let the model think, and drag over words to see what they came from.

One process, one model, one page; ``flashtrace-plugin serve`` starts it. Needs the extra ``serve``.

guard:  who may ask: host, origin, token, size; and the headers of every answer
jobs:   one at a time, the others wait and are told how many are before them
engine: what the model is asked: to write, and to explain on a recorded pass
view:   results as the page shows them
app:    the routes
"""
