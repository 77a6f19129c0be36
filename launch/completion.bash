# completion.bash: completes commands, options, files, and the keys and values of --set, in bash.
#
#   source launch/completion.bash        # an installed one is found by bash-completion (docs/install.md)
#
# What can be typed is asked of the program itself, so a new option or key is known at once.
# shellcheck shell=bash

# _safegrad_ask PROGRAM ARGUMENT...: what the program prints; it is asked once, until it is another file.
_safegrad_ask() {
  local program question
  REPLY=''
  program=$(type -P -- "$1") || return
  question="$program $(stat -L -c %Y -- "$program") ${*:2}"
  declare -gA _safegrad_answers
  [[ -v _safegrad_answers[$question] ]] ||
    _safegrad_answers[$question]=$("$program" "${@:2}" 2>/dev/null)
  REPLY=${_safegrad_answers[$question]}
}

# _safegrad_section NAME: the lines under a heading of a help text on stdin.
_safegrad_section() {
  awk -v heading="$1:" '/^[^ ]/ { inside = $0 == heading; next } inside && /^  [^ ]/'
}

# _safegrad_keys: a line for each key of the schema on stdin: the key, then the words it takes, if it takes words.
_safegrad_keys() {
  awk '
    # The schema is indented by two: at odd levels stands what a key has, at even ones a key or a bracket.
    { match($0, /[^ ]/); level = (RSTART - 1) / 2; text = substr($0, RSTART); word = "" }
    match(text, /^"[^"]+"/) { word = substr(text, 2, RLENGTH - 2) }
    { name[level] = word }
    level % 2 == 0 && text ~ /^"[^"]+": [{]$/ {
      path = ""
      for (i = 2; i <= level && name[i - 1] == "properties"; i += 2) path = path (i > 2 ? "." : "") name[i]
      if (i <= level) next
      key = path; at = level; keys[++count] = key
    }
    word == "properties" && level == at + 1 { section[key] = 1 }
    word == "type" && level == at + 1 && text ~ /"boolean"/ { words[key] = " true false" }
    word == "const" && name[at + 1] == "anyOf" { gsub(/.*: "|",?$/, "", text); words[key] = words[key] " " text }
    listing && level == at + 2 { words[key] = words[key] " " word }
    word == "enum" { listing = level == at + 1 }
    text ~ /^]/ { listing = 0 }
    END { for (i = 1; i <= count; ++i) if (!(keys[i] in section)) print keys[i] words[keys[i]] }'
}

# _safegrad_value PROGRAM COMMAND OPTION WORD: completes what follows an option; fails where nothing does.
_safegrad_value() {
  local kind keys
  _safegrad_ask "$1" "$2" --help
  kind=$(_safegrad_section Options <<<"$REPLY" |
    awk -v option="$3" '{ n = split($1, names, ","); for (i = 1; i <= n; ++i) if (names[i] == option) print $0 " " }' |
    sed -n 's/^  [^ ]* \([^ ]*\)  .*/\1/p')
  case $kind in
    '') return 1 ;;
    KEY=VALUE)
      _safegrad_ask "$1" schema
      keys=$(_safegrad_keys <<<"$REPLY" | cut -d ' ' -f 1)
      mapfile -t COMPREPLY < <(compgen -S = -W "$keys" -- "$4")
      compopt -o nospace 2>/dev/null ;;
    *'|'* | FOLDER)
      mapfile -t COMPREPLY < <(compgen -W "$(tr '|' '\n' <<<"$kind" | grep -v '^[A-Z]')" -- "$4"; compgen -d -- "$4")
      compopt -o filenames 2>/dev/null ;;
    FILE | PATH | TEXT)
      mapfile -t COMPREPLY < <(compgen -f -- "$4")
      compopt -o filenames 2>/dev/null ;;
  esac
  return 0
}

_safegrad() {
  local program=${COMP_WORDS[0]} word=${COMP_WORDS[COMP_CWORD]} command='' key='' i
  local before=${COMP_WORDS[COMP_CWORD - 1]}
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; ++i)); do
    [[ ${COMP_WORDS[i]} == -* ]] || { command=${COMP_WORDS[i]} && break; }
  done

  # bash takes a=b apart.
  if [[ $word == = ]]; then
    key=$before word=''
  elif [[ $before == = ]]; then
    key=${COMP_WORDS[COMP_CWORD - 2]}
  fi
  if [[ -n $key && $key != -* ]]; then
    _safegrad_ask "$program" schema
    mapfile -t COMPREPLY < <(
      compgen -W "$(_safegrad_keys <<<"$REPLY" | sed -n "s/^${key//./\\.} //p")" -- "$word")
    return
  fi

  if [[ -n $command && ${key:-$before} == -* ]]; then
    _safegrad_value "$program" "$command" "${key:-$before}" "$word" && return
  fi
  _safegrad_ask "$program" ${command:+"$command"} --help
  if [[ $word == -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$(_safegrad_section Options <<<"$REPLY" | awk '{ gsub(",", "\n", $1); print $1 }')" -- "$word")
  elif [[ -z $command ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$(_safegrad_section Subcommands <<<"$REPLY" | awk '{ print $1 }')" -- "$word")
  elif _safegrad_section Positionals <<<"$REPLY" | grep -q '^  config '; then
    mapfile -t COMPREPLY < <(compgen -f -X '!*.yaml' -- "$word"; compgen -d -- "$word")
    compopt -o filenames 2>/dev/null
  elif _safegrad_section Positionals <<<"$REPLY" | grep -q .; then
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
    compopt -o filenames 2>/dev/null
  fi
}

complete -F _safegrad safegrad
