"""Adapters on the Hub."""
