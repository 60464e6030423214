"""The one place that touches what other libraries keep private; see the layer table in docs/architecture.md."""
