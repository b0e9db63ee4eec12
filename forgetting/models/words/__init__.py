"""Names of what photographs commonly show. Each kind is a file KIND.txt: a name a line, sorted, no
name twice in all files, and a comment at its head. The lists were written from general knowledge
and copied from no other list; they say what is common, not how often it is seen."""
