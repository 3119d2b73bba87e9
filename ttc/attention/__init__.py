"""Sparse-attention decoding in stock vLLM: a plugin that chooses which KV pages each decoded token reads.

``settings`` (no torch) holds the words that users and requests speak; ``choose`` the page choice, in C++ and in torch; ``rows``
carries each request's setting to the worker; ``cpu`` is the attention backend; ``plugin`` registers it with vLLM.
"""
