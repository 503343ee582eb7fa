"""What the entry scripts do with their settings: set up, fit, evaluate, write.

``runs`` and ``language_model`` need no torch, so that the scripts can refuse mistakes quickly.
"""
