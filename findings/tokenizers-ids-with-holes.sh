#!/usr/bin/env bash
# tokenizers 0.23.3: a token that is added to a vocabulary with holes gets the id of another token.
#
# Guess, written before the run: new tokens get ids after the largest one, so that none has two names.
# Seen: ids go on from the *number* of tokens. With ids 0, 2, 5 the three next tokens get 3, 4 and 5;
# 5 is then the id of two tokens, and `id_to_token(5)` tells the new one. Nothing warns.
# The same holds for `added_tokens` in tokenizer.json: the ids that stand there are not read. With gaps
# between them the loaded tokenizer has other ids than its file.
# Whom it concerns: who removes tokens from a vocabulary and adds others, or merges vocabularies.
# What Suture does: it reads added tokens under the ids with which they are loaded, and refuses to add
# tokens to a vocabulary with holes (tests/test_vocabulary.py).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -qq --disable-pip-version-check tokenizers==0.23.3
"$place/venv/bin/python" - <<'PY'
import json

from tokenizers import Tokenizer, models

words = Tokenizer(models.WordLevel({"red": 0, "[UNK]": 2, "blue": 5}, unk_token="[UNK]"))
assert words.get_vocab_size() == 3  # the number of tokens, not the largest id and one
words.add_tokens(["green", "white", "black"])
ids = {word: words.token_to_id(word) for word in ("blue", "green", "white", "black")}
print(ids, "id 5 is", words.id_to_token(5))
assert ids == {"blue": 5, "green": 3, "white": 4, "black": 5}, ids
assert words.id_to_token(5) == "black"

words = Tokenizer(models.WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]"))
words.add_tokens(["green", "white"])
file = json.loads(words.to_str())
file["added_tokens"][1]["id"] = 7  # as after 3 to 6 were taken out
loaded = Tokenizer.from_str(json.dumps(file))
print("white has the id 7 in the file, and", loaded.token_to_id("white"), "once loaded")
assert loaded.token_to_id("white") == 3
PY
