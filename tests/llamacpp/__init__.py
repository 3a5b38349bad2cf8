"""Tests against llama.cpp's own tools: `make test-llamacpp`."""
