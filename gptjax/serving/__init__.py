"""Many people share one model: continuous batching, an HTTP interface, and a page to play on."""
