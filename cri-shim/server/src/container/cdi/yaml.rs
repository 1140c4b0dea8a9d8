//! The part of YAML that Container Device Interface files are written in: block and flow
//! collections of plain and quoted scalars. Anchors, tags, block scalars and scalars over several
//! lines are refused.

use serde_json::{Map, Number, Value};

/// How deep collections may lie in each other.
const DEPTH: u32 = 32;

/// A line without its comment.
struct Line<'a> {
    number: usize,
    indent: usize,
    text: &'a str,
}

/// Reads one document. The error has the line.
pub(super) fn parse(text: &str) -> Result<Value, String> {
    let mut lines = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        let bare = without_comment(line).trim_end();
        let text = bare.trim_start_matches(' ');
        if text.is_empty() || bare == "---" && lines.is_empty() {
            continue;
        }
        if text.starts_with('\t') {
            return Err(format!("line {number}: indented with a tab"));
        }
        if bare == "---" || bare == "..." || bare.starts_with('%') {
            return Err(format!("line {number}: there may be one document only"));
        }
        lines.push(Line {
            number,
            indent: bare.len() - text.len(),
            text,
        });
    }
    let mut parser = Parser { lines, at: 0 };
    let Some(first) = parser.lines.first().map(|line| line.indent) else {
        return Ok(Value::Null);
    };
    let value = parser.block(first, DEPTH)?;
    match parser.lines.get(parser.at) {
        Some(line) => Err(format!(
            "line {}: indented as nothing above it is",
            line.number
        )),
        None => Ok(value),
    }
}

/// A comment begins with a number sign after a blank, outside of quotes.
fn without_comment(line: &str) -> &str {
    let mut quote = None;
    let mut before = ' ';
    for (at, c) in line.char_indices() {
        match quote {
            Some('"') if before == '\\' => {
                before = ' ';
                continue;
            }
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '#' && before.is_whitespace() => {
                return line.get(..at).unwrap_or_default();
            }
            None if (c == '"' || c == '\'') && !before.is_alphanumeric() => quote = Some(c),
            None => {}
        }
        before = c;
    }
    line
}

struct Parser<'a> {
    lines: Vec<Line<'a>>,
    at: usize,
}

impl<'a> Parser<'a> {
    fn here(&self) -> Option<(usize, usize, &'a str)> {
        let line = self.lines.get(self.at)?;
        Some((line.number, line.indent, line.text))
    }

    /// What begins at this line, whose indentation is `indent`.
    fn block(&mut self, indent: usize, depth: u32) -> Result<Value, String> {
        let Some((number, _, text)) = self.here() else {
            return Ok(Value::Null);
        };
        let Some(depth) = depth.checked_sub(1) else {
            return Err(format!("line {number}: nested too deep"));
        };
        if item(text).is_some() {
            self.sequence(indent, depth)
        } else if key(text).is_some() {
            self.mapping(indent, depth)
        } else {
            self.at += 1;
            scalar_or_flow(text, depth).map_err(|why| format!("line {number}: {why}"))
        }
    }

    fn sequence(&mut self, indent: usize, depth: u32) -> Result<Value, String> {
        let mut all = Vec::new();
        while let Some((_, here, text)) = self.here()
            && here == indent
            && let Some(rest) = item(text)
        {
            if rest.is_empty() {
                self.at += 1;
                all.push(self.nested(indent, depth, false)?);
                continue;
            }
            // What follows the dash is a block of its own, as far in as it stands.
            let inner = indent + text.len() - rest.len();
            if let Some(line) = self.lines.get_mut(self.at) {
                line.indent = inner;
                line.text = rest;
            }
            all.push(self.block(inner, depth)?);
        }
        Ok(Value::Array(all))
    }

    fn mapping(&mut self, indent: usize, depth: u32) -> Result<Value, String> {
        let mut all = Map::new();
        while let Some((number, here, text)) = self.here()
            && here == indent
        {
            let at_line = |why: String| format!("line {number}: {why}");
            let Some((name, rest)) = key(text) else {
                return Err(at_line("this is no key of the mapping above".to_owned()));
            };
            let name = match scalar(name).map_err(at_line)? {
                Value::String(name) => name,
                other => other.to_string(),
            };
            self.at += 1;
            let value = match rest.is_empty() {
                true => self.nested(indent, depth, true)?,
                false => scalar_or_flow(rest, depth).map_err(at_line)?,
            };
            if all.insert(name.clone(), value).is_some() {
                return Err(at_line(format!("the key {name:?} is there twice")));
            }
        }
        Ok(Value::Object(all))
    }

    /// The value below a key or a dash. A list may stand as far left as its key.
    fn nested(&mut self, indent: usize, depth: u32, list: bool) -> Result<Value, String> {
        match self.here() {
            Some((_, inner, _)) if inner > indent => self.block(inner, depth),
            Some((_, inner, text)) if list && inner == indent && item(text).is_some() => {
                self.block(inner, depth)
            }
            _ => Ok(Value::Null),
        }
    }
}

/// What follows the dash of a list's item.
fn item(text: &str) -> Option<&str> {
    match text.strip_prefix('-')? {
        "" => Some(""),
        rest => rest.starts_with(' ').then(|| rest.trim_start()),
    }
}

/// A key and what follows its colon.
fn key(text: &str) -> Option<(&str, &str)> {
    let first = text.chars().next()?;
    if first == '[' || first == '{' {
        return None;
    }
    let begin = match first {
        '"' | '\'' => 1 + text.get(1..)?.find(first)?,
        _ => 0,
    };
    let colon = text.match_indices(':').find(|(at, _)| {
        let after = text.get(at + 1..).unwrap_or_default();
        *at >= begin && (after.is_empty() || after.starts_with(' '))
    });
    let (at, _) = colon?;
    Some((text.get(..at)?.trim_end(), text.get(at + 1..)?.trim_start()))
}

fn scalar_or_flow(text: &str, depth: u32) -> Result<Value, String> {
    if !text.starts_with(['[', '{']) {
        return scalar(text);
    }
    let mut rest = text;
    let value = flow(&mut rest, depth)?;
    match rest.trim_start() {
        "" => Ok(value),
        more => Err(format!("{more:?} follows what is complete")),
    }
}

/// A collection or a scalar in brackets, which it takes from the beginning of `rest`.
fn flow(rest: &mut &str, depth: u32) -> Result<Value, String> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err("nested too deep".to_owned());
    };
    let skip = |rest: &mut &str| *rest = rest.trim_start();
    skip(rest);
    let close = match rest.chars().next() {
        Some('[') => ']',
        Some('{') => '}',
        _ => {
            let word = flow_word(rest)?;
            return scalar(word);
        }
    };
    *rest = rest.get(1..).unwrap_or_default();
    let (mut list, mut map) = (Vec::new(), Map::new());
    loop {
        skip(rest);
        if let Some(after) = rest.strip_prefix(close) {
            *rest = after;
            break;
        }
        if close == '}' {
            let name = match scalar(flow_word(rest)?)? {
                Value::String(name) => name,
                other => other.to_string(),
            };
            skip(rest);
            *rest = rest
                .strip_prefix(':')
                .ok_or_else(|| format!("the key {name:?} has no value"))?;
            let value = flow(rest, depth)?;
            if map.insert(name.clone(), value).is_some() {
                return Err(format!("the key {name:?} is there twice"));
            }
        } else {
            list.push(flow(rest, depth)?);
        }
        skip(rest);
        match rest.strip_prefix(',') {
            Some(after) => *rest = after,
            None if rest.starts_with(close) => {}
            None => return Err(format!("there is no closing {close:?} on the line")),
        }
    }
    Ok(match close {
        ']' => Value::Array(list),
        _ => Value::Object(map),
    })
}

/// A quoted or plain word within brackets.
fn flow_word<'a>(rest: &mut &'a str) -> Result<&'a str, String> {
    let text: &'a str = rest;
    let end = match text.chars().next() {
        Some(quote @ ('"' | '\'')) => closing(text, quote)? + 1,
        _ => text
            .char_indices()
            .find(|(at, c)| {
                ",[]{}".contains(*c)
                    || *c == ':'
                        && text
                            .get(at + 1..)
                            .is_none_or(|after| after.is_empty() || after.starts_with([' ', ',']))
            })
            .map_or(text.len(), |(at, _)| at),
    };
    *rest = text.get(end..).unwrap_or_default();
    Ok(text.get(..end).unwrap_or_default().trim_end())
}

/// Where the quote that a text begins with is closed.
fn closing(text: &str, quote: char) -> Result<usize, String> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' if quote == '"' => escaped = true,
            c if c == quote => {
                // Doubled, it is one of the text's.
                let next = text.get(at + 1..).unwrap_or_default();
                if quote == '\'' && next.starts_with('\'') {
                    escaped = true;
                } else {
                    return Ok(at);
                }
            }
            _ => {}
        }
    }
    Err(format!("there is no closing {quote} on the line"))
}

fn scalar(text: &str) -> Result<Value, String> {
    let first = text.chars().next().unwrap_or(' ');
    if first == '"' || first == '\'' {
        let end = closing(text, first)?;
        if end + 1 != text.len() {
            return Err(format!("something follows the closing {first}"));
        }
        if first == '"' {
            // JSON's escapes are YAML's, and the most of them.
            return serde_json::from_str(text).map_err(|error| format!("{text}: {error}"));
        }
        let inner = text.get(1..end).unwrap_or_default();
        return Ok(Value::String(inner.replace("''", "'")));
    }
    if "&*!|>@`%".contains(first) {
        return Err(format!(
            "{text:?}: what begins with {first} is not supported"
        ));
    }
    Ok(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        text => number(text).unwrap_or_else(|| Value::String(text.to_owned())),
    })
}

fn number(text: &str) -> Option<Value> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let based = |digits: &str, radix: u32| {
        let plain = digits.starts_with(|c: char| c.is_ascii_alphanumeric());
        plain.then(|| i64::from_str_radix(digits, radix).ok())?
    };
    let whole = if let Some(hexadecimal) = digits.strip_prefix("0x") {
        based(hexadecimal, 16)
    } else if let Some(octal) = digits.strip_prefix("0o") {
        based(octal, 8)
    } else if digits.len() > 1 && digits.starts_with('0') {
        // As in YAML 1.1, and as everybody writes the mode of a file.
        based(digits, 8)
    } else {
        based(digits, 10)
    };
    match whole {
        Some(whole) => Some(Value::from(sign * whole)),
        None if digits.starts_with(|c: char| c.is_ascii_digit()) => {
            Number::from_f64(text.parse().ok()?).map(Value::Number)
        }
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_as_vendors_write_it() -> Result<(), String> {
        let text = r##"---
# made by a tool
cdiVersion: "0.6.0"
kind: vendor.com/device   # the class
containerEdits:
  env: [A=1, 'B=it''s', "C=\"#\""]
devices:
- name: first
  containerEdits:
    deviceNodes:
      - path: /dev/a
        hostPath: /dev/null
        fileMode: 0666
        major: 1
      -
        path: "/dev/b: c"
    hooks:
    - {hookName: createContainer, path: /bin/true, args: [true, "-x"], timeout: 3}
- name: "2"
  annotations: {}
  containerEdits:
    mounts:
        - hostPath: /a#b
          containerPath: /b:/c
          options:
          - ro
          - bind
empty:
"##;
        let value = parse(text)?;
        assert_eq!(
            value,
            json!({
                "cdiVersion": "0.6.0",
                "kind": "vendor.com/device",
                "containerEdits": { "env": ["A=1", "B=it's", "C=\"#\""] },
                "devices": [
                    {
                        "name": "first",
                        "containerEdits": {
                            "deviceNodes": [
                                { "path": "/dev/a", "hostPath": "/dev/null", "fileMode": 0o666, "major": 1 },
                                { "path": "/dev/b: c" },
                            ],
                            "hooks": [{
                                "hookName": "createContainer", "path": "/bin/true",
                                "args": [true, "-x"], "timeout": 3,
                            }],
                        },
                    },
                    {
                        "name": "2",
                        "annotations": {},
                        "containerEdits": {
                            "mounts": [{
                                "hostPath": "/a#b", "containerPath": "/b:/c",
                                "options": ["ro", "bind"],
                            }],
                        },
                    },
                ],
                "empty": null,
            })
        );
        Ok(())
    }

    #[test]
    fn what_is_not_understood_is_told_with_its_line() {
        for (text, line) in [
            ("a: 1\na: 2\n", 2),
            ("a: |\n  text\n", 1),
            ("a: &b 1\n", 1),
            ("a: [1, 2\n", 1),
            ("a: \"open\n", 1),
            ("a: 1\n---\nb: 1\n", 2),
            ("a:\n    b: 1\n  c: 1\n", 3),
            ("a: 1\n\tb: 1\n", 2),
            ("a: 1\nb\n", 2),
        ] {
            let said = parse(text).expect_err(text);
            assert!(
                said.starts_with(&format!("line {line}: ")),
                "{text:?}: {said}"
            );
        }
        assert!(parse(&"- ".repeat(100)).is_err());
        assert!(parse(&format!("a: {}", "[".repeat(100))).is_err());
    }

    #[test]
    fn scalars_have_the_types_that_they_look_like() -> Result<(), String> {
        let value = parse("[1, -2, 0x10, 0o17, 1.5, a, 1a, '1', ~, true, 0-1]")?;
        assert_eq!(
            value,
            json!([1, -2, 16, 15, 1.5, "a", "1a", "1", null, true, "0-1"])
        );
        Ok(())
    }
}
