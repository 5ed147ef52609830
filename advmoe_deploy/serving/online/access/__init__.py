"""Access to a server that other machines reach: tokens, and TLS."""
