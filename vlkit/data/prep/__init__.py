"""Prep: turn a raw folder in any of the known layouts into a prepared folder."""
