"""Modules of functions for one make of device."""
