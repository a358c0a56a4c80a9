"""Webhooks: where they may be sent, how they are signed, and the role that sends them."""
