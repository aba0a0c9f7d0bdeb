"""Models of frameworks as networks, one folder each; an adapter imports graph/ alone."""
