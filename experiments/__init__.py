"""What was found out with this repository: every table and figure of docs/, by one command."""
