"""How a job looks to a person: pages, pictures, and the live picture in a terminal."""
