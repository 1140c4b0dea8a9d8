//! Finds the functions of a source file with their lengths, and the names of its types.

use crate::tokens::{Kind, Token, after_group};

pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) line: usize,
    /// The number of lines from `fn` to the closing brace.
    pub(crate) lines: usize,
    /// True if the function has `#[expect(clippy::too_many_lines, …)]` or
    /// `#[allow(clippy::too_many_lines)]`.
    pub(crate) may_be_long: bool,
}

pub(crate) struct Type {
    pub(crate) name: String,
    pub(crate) line: usize,
    /// True if the type is defined in a function's body.
    pub(crate) local: bool,
}

pub(crate) fn functions(tokens: &[Token]) -> Vec<Function> {
    let mut all = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        // `fn` without a name, as in `fn(u32)`, is part of a type.
        let name = tokens.get(at + 1).and_then(Token::word);
        let (Some(name), true) = (name, token.is("fn")) else {
            continue;
        };
        let Some(open) = body(tokens, at) else {
            continue;
        };
        let end = tokens.get(after_group(tokens, open) - 1);
        all.push(Function {
            name: name.to_owned(),
            line: token.line,
            lines: end.map_or(0, |end| end.line) + 1 - token.line,
            may_be_long: may_be_long(tokens, at),
        });
    }
    all
}

/// Returns the index of the brace that opens a function's body. A trait can declare a function
/// without a body. For such a function, the result is `None`.
fn body(tokens: &[Token], function: usize) -> Option<usize> {
    let mut at = function;
    loop {
        match &tokens.get(at)?.kind {
            Kind::Mark("(" | "[") => at = after_group(tokens, at),
            Kind::Mark("{") => return Some(at),
            Kind::Mark(";") => return None,
            _ => at += 1,
        }
    }
}

/// Returns whether an attribute before this `fn` allows the function to be long. Words such as
/// `pub` or `async` can be between the attribute and `fn`.
fn may_be_long(tokens: &[Token], function: usize) -> bool {
    let mut at = function;
    while let Some(before) = at.checked_sub(1).and_then(|before| tokens.get(before)) {
        match &before.kind {
            Kind::Word(word)
                if matches!(
                    word.as_str(),
                    "pub" | "async" | "const" | "unsafe" | "extern" | "default"
                ) =>
            {
                at -= 1;
            }
            Kind::Literal => at -= 1,
            Kind::Mark(")" | "]") => {
                let Some(open) = before_group(tokens, at - 1) else {
                    return false;
                };
                let group = tokens.get(open..at).unwrap_or_default();
                let is = |text: &str| group.iter().any(|token| token.is(text));
                if is("too_many_lines") && (is("expect") || is("allow")) {
                    return true;
                }
                at = open;
            }
            Kind::Mark("#") => at -= 1,
            _ => return false,
        }
    }
    false
}

/// Returns the index of the opening bracket for the closing bracket at the index `close`.
fn before_group(tokens: &[Token], close: usize) -> Option<usize> {
    let mut depth = 0;
    for at in (0..=close).rev() {
        match &tokens.get(at)?.kind {
            Kind::Mark("}" | ")" | "]") => depth += 1,
            Kind::Mark("{" | "(" | "[") => {
                depth -= 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// The kind of code between a pair of braces. A `type` item is listed as a type of the crate only
/// if it is not in a trait or an implementation.
#[derive(Clone, Copy, PartialEq)]
enum Block {
    Module,
    /// A trait or an implementation. A `type` in such a block is an associated type.
    Associated,
    Code,
}

pub(crate) fn types(tokens: &[Token]) -> Vec<Type> {
    let mut all = Vec::new();
    let mut blocks = Vec::new();
    let mut next = Block::Code;
    for (at, token) in tokens.iter().enumerate() {
        match &token.kind {
            Kind::Word(word) => match word.as_str() {
                "mod" => next = Block::Module,
                "trait" | "impl" if begins_item(tokens, at) => next = Block::Associated,
                "fn" => next = Block::Code,
                _ => {}
            },
            Kind::Mark("{") => {
                blocks.push(next);
                next = Block::Code;
            }
            Kind::Mark("}") => {
                blocks.pop();
            }
            Kind::Mark(";") => next = Block::Code,
            _ => {}
        }
        if let Some(name) = defines_type(tokens, at) {
            let associated = token.is("type") && blocks.last() == Some(&Block::Associated);
            if !associated {
                all.push(Type {
                    name: name.to_owned(),
                    line: token.line,
                    local: blocks.contains(&Block::Code),
                });
            }
        }
    }
    all
}

/// Returns the name of the type whose definition begins at the index `at`.
fn defines_type(tokens: &[Token], at: usize) -> Option<&str> {
    let word = tokens.get(at)?.word()?;
    let defines = matches!(word, "struct" | "enum" | "union" | "trait" | "type");
    let name = tokens.get(at + 1)?.word()?;
    let capital = name.starts_with(|first: char| !first.is_lowercase());
    (defines && capital && begins_item(tokens, at)).then_some(name)
}

/// Returns whether an item can begin at the index `at`. The result depends on the token before the
/// index. The word at the index is not sufficient: `impl` is also part of types, and `union` can be
/// the name of a variable.
fn begins_item(tokens: &[Token], at: usize) -> bool {
    let Some(before) = at.checked_sub(1).and_then(|before| tokens.get(before)) else {
        return true;
    };
    match &before.kind {
        Kind::Mark("{" | "}" | ";" | "]" | ")") => true,
        Kind::Word(word) => matches!(word.as_str(), "pub" | "unsafe" | "auto" | "default"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::tokens;

    fn lengths(source: &str) -> Vec<(String, usize, bool)> {
        let all = functions(&tokens(source)).into_iter();
        all.map(|function| (function.name, function.lines, function.may_be_long))
            .collect()
    }

    fn names(source: &str) -> Vec<(String, bool)> {
        let all = types(&tokens(source)).into_iter();
        all.map(|one| (one.name, one.local)).collect()
    }

    #[test]
    fn the_lines_of_a_function_are_counted_from_fn_to_the_closing_brace() {
        let source = "/// doc
            #[inline]
            pub fn one(
                x: [u8; 2],
            ) -> u8 {
                // }
                \"}\"
            }
            trait T { fn declared(&self); }
            type F = fn(u32) -> u32;
            fn two() {}";
        assert_eq!(
            lengths(source),
            [("one".to_owned(), 6, false), ("two".to_owned(), 1, false)]
        );
    }

    #[test]
    fn an_attribute_allows_a_function_to_be_long() {
        let source = "
            #[expect(clippy::too_many_lines, reason = \"one flat match\")]
            #[must_use]
            pub(crate) async unsafe extern \"C\" fn one() {}
            fn two() {}
            #[allow(clippy::too_many_lines)]
            fn three() {}
            #[warn(clippy::too_many_lines)]
            fn four() {}";
        let long = lengths(source).into_iter().map(|(_, _, long)| long);
        assert_eq!(long.collect::<Vec<_>>(), [true, false, true, false]);
    }

    #[test]
    fn types_are_found_in_modules_and_in_functions() {
        let source = "
            pub struct A; pub(crate) enum B {} type C = u8; unsafe trait D { type Item; }
            impl D for A { type Item = u8; fn f() { struct E; type G = u8; } }
            mod inner { union H { a: u8 } }
            fn f(x: impl Iterator) { let union = 1; struct I; }";
        let all = names(source);
        let at_module: Vec<&str> = all.iter().filter(|one| !one.1).map(|one| &*one.0).collect();
        let local: Vec<&str> = all.iter().filter(|one| one.1).map(|one| &*one.0).collect();
        assert_eq!(at_module, ["A", "B", "C", "D", "H"]);
        assert_eq!(local, ["E", "G", "I"]);
    }
}
