"""Tasks that a server asks for while it runs."""
