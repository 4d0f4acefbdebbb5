"""Reads what a screen shows. The terminal view and the web page share this code.

Each module has dataclasses and two functions: a flow such as `overview.overview`, which both drivers run, and an
asyncio function such as `overview.read_overview`, which runs this flow. All figures come from the flows behind the
public API, so a screen shows what the API returns. These modules also sort and filter.
"""
