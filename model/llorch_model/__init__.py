"""Everything about model files: what their headers say, how much memory they take, where they come from, how they get here."""
