"""The web page of app.py: what it draws, and how it is laid out."""
