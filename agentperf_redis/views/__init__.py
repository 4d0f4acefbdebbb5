"""What a screen shows, read once and in one place: for the terminal view and for the web page.

Each module has dataclasses and two functions: a flow such as `overview.overview`, which both drivers run, and an
asyncio function such as `overview.read_overview`, which runs this flow. All figures come from the flows behind the
public API, so a screen shows what the API returns. Sorting and filtering are here too.
"""
