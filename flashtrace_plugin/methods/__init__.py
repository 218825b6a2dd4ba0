"""The methods; each is one declaration, and :mod:`flashtrace_plugin.methods.base` drives them."""
