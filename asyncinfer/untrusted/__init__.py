"""Bytes, text and files that anybody may have written, read without trusting them."""
