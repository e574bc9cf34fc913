"""From prompts to text: one graph and its session, requests, samples, files of prompts."""
