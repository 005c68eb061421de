"""Answers that keep to a grammar: which tokens may come next. The work is llguidance's."""

from turbolm.grammar.compiler import CompiledGrammar, GrammarCompiler
from turbolm.grammar.state import GrammarState, MaskRows, Words, fill_masks
from turbolm.grammar.tool_choice import tool_grammar

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarState", "MaskRows", "Words", "fill_masks", "tool_grammar"]
