"""Rewrite: every gating call of a graph becomes a dual-path call, and a report says so."""
