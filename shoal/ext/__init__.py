"""What other programs of a user's want of Shoal, in their own words. Nothing inside Shoal imports from here."""
