"""Analysis: facts about a captured graph. Nothing here changes one."""
