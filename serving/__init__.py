"""The service behind deploy/python/web_service.py: Paddle Serving's Pipeline mode on today's Python and Paddle."""
