"""Adapters for other frameworks, one module for each framework.

Each module needs the extra of its name. The rest of the library imports none of these modules.
"""
