//! Splits Rust source into tokens, without comments, and separates product code from test code.

/// The kind of a token. The text of a literal or lifetime is not stored, because this program needs
/// only its presence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Word(String),
    /// One character of punctuation, or `::`.
    Mark(&'static str),
    Other(char),
    Literal,
    Lifetime,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    /// The line in which the token begins, counted from 1.
    pub(crate) line: usize,
}

impl Token {
    pub(crate) fn word(&self) -> Option<&str> {
        match &self.kind {
            Kind::Word(word) => Some(word),
            _ => None,
        }
    }

    pub(crate) fn is(&self, text: &str) -> bool {
        match &self.kind {
            Kind::Word(word) => word == text,
            Kind::Mark(mark) => *mark == text,
            Kind::Other(other) => text.chars().eq([*other]),
            Kind::Literal | Kind::Lifetime => false,
        }
    }
}

/// The punctuation marks that this program evaluates.
const MARKS: &[&str] = &["::", "{", "}", "(", ")", "[", "]", ";", ",", "#"];

struct Reader {
    chars: Vec<char>,
    at: usize,
    line: usize,
}

impl Reader {
    fn peek(&self, ahead: usize) -> char {
        self.chars.get(self.at + ahead).copied().unwrap_or('\0')
    }

    fn ended(&self) -> bool {
        self.at >= self.chars.len()
    }

    fn skip(&mut self, count: usize) {
        for _ in 0..count {
            if self.peek(0) == '\n' {
                self.line += 1;
            }
            self.at += 1;
        }
    }

    fn starts(&self, text: &str) -> bool {
        text.chars()
            .enumerate()
            .all(|(ahead, char)| self.peek(ahead) == char)
    }

    fn skip_line(&mut self) {
        while !self.ended() && self.peek(0) != '\n' {
            self.skip(1);
        }
    }

    /// Skips a block comment, including the block comments nested in it.
    fn skip_block_comment(&mut self) {
        let mut depth = 0;
        while !self.ended() {
            if self.starts("/*") {
                depth += 1;
                self.skip(2);
            } else if self.starts("*/") {
                depth -= 1;
                self.skip(2);
                if depth == 0 {
                    return;
                }
            } else {
                self.skip(1);
            }
        }
    }

    /// Skips a literal between two `quote` characters. The literal can contain escapes.
    fn skip_quoted(&mut self, quote: char) {
        self.skip(1);
        while !self.ended() && self.peek(0) != quote {
            self.skip(if self.peek(0) == '\\' { 2 } else { 1 });
        }
        self.skip(1);
    }

    /// Skips a raw string whose prefix was already read. The next character is `#` or a quotation
    /// mark.
    fn skip_raw(&mut self) {
        let mut end = String::from('"');
        while self.peek(0) == '#' {
            end.push('#');
            self.skip(1);
        }
        self.skip(1);
        while !self.ended() && !self.starts(&end) {
            self.skip(1);
        }
        self.skip(end.len());
    }

    fn word(&mut self) -> String {
        let mut word = String::new();
        while is_word_char(self.peek(0)) {
            word.push(self.peek(0));
            self.skip(1);
        }
        word
    }

    /// Reads a word. If the word is the prefix of a literal, such as `b`, this function reads the
    /// whole literal.
    fn word_or_literal(&mut self) -> Kind {
        let word = self.word();
        let raw = matches!(word.as_str(), "r" | "br" | "cr");
        let prefix = raw || matches!(word.as_str(), "b" | "c");
        match self.peek(0) {
            '"' if raw => self.skip_raw(),
            '"' if prefix => self.skip_quoted('"'),
            '\'' if word == "b" => self.skip_quoted('\''),
            '#' if raw && matches!(self.peek(1), '"' | '#') => self.skip_raw(),
            '#' if word == "r" && is_word_char(self.peek(1)) => {
                self.skip(1);
                return Kind::Word(self.word());
            }
            _ => return Kind::Word(word),
        }
        Kind::Literal
    }

    /// Reads a literal such as `'a'`, or a lifetime such as `'a`.
    fn lifetime_or_char(&mut self) -> Kind {
        if self.peek(1) == '\\' || self.peek(2) == '\'' {
            self.skip_quoted('\'');
            return Kind::Literal;
        }
        self.skip(1);
        self.word();
        Kind::Lifetime
    }

    fn mark(&mut self) -> Kind {
        let mark = MARKS.iter().find(|mark| self.starts(mark));
        let kind = mark.map_or(Kind::Other(self.peek(0)), |mark| Kind::Mark(mark));
        self.skip(mark.map_or(1, |mark| mark.len()));
        kind
    }
}

fn is_word_char(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// Returns all tokens of a source file.
pub(crate) fn tokens(source: &str) -> Vec<Token> {
    let mut reader = Reader {
        chars: source.chars().collect(),
        at: 0,
        line: 1,
    };
    let mut all = Vec::new();
    while !reader.ended() {
        let line = reader.line;
        let kind = match reader.peek(0) {
            char if char.is_whitespace() => {
                reader.skip(1);
                continue;
            }
            '/' if reader.peek(1) == '/' => {
                reader.skip_line();
                continue;
            }
            '/' if reader.peek(1) == '*' => {
                reader.skip_block_comment();
                continue;
            }
            '"' => {
                reader.skip_quoted('"');
                Kind::Literal
            }
            '\'' => reader.lifetime_or_char(),
            char if char.is_ascii_digit() => {
                reader.word();
                Kind::Literal
            }
            char if is_word_char(char) => reader.word_or_literal(),
            _ => reader.mark(),
        };
        all.push(Token { kind, line });
    }
    all
}

/// Returns the index of the token after a group. The group begins with the bracket at the index
/// `open`. The bracket can be round, square or curly.
pub(crate) fn after_group(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match &token.kind {
            Kind::Mark("{" | "(" | "[") => depth += 1,
            Kind::Mark("}" | ")" | "]") => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// A file's product code: its tokens without items under `#[cfg(test)]`.
pub(crate) struct Product {
    pub(crate) tokens: Vec<Token>,
    /// The modules under `#[cfg(test)]` that are in separate files.
    pub(crate) test_modules: Vec<String>,
    /// The number of lines of the items under `#[cfg(test)]`.
    pub(crate) test_lines: usize,
}

/// Removes the items that are compiled only for tests.
pub(crate) fn product(all: &[Token]) -> Product {
    let mut product = Product {
        tokens: Vec::new(),
        test_modules: Vec::new(),
        test_lines: 0,
    };
    let mut at = 0;
    while let Some(token) = all.get(at) {
        if !is_cfg_test(all, at) {
            product.tokens.push(token.clone());
            at += 1;
            continue;
        }
        let begin = after_attributes(all, at);
        let end = after_item(all, begin);
        let item = all.get(begin..end).unwrap_or_default();
        if let [module, name, semicolon] = item
            && module.is("mod")
            && semicolon.is(";")
        {
            product.test_modules.extend(name.word().map(str::to_owned));
        }
        let last = all.get(end - 1).unwrap_or(token);
        product.test_lines += last.line + 1 - token.line;
        at = end;
    }
    product
}

/// Returns whether an attribute `#[cfg(test)]` or `#[cfg(all(test, …))]` begins at the index `at`.
fn is_cfg_test(all: &[Token], at: usize) -> bool {
    let is = |ahead: usize, text: &str| all.get(at + ahead).is_some_and(|token| token.is(text));
    let cfg = is(0, "#") && is(1, "[") && is(2, "cfg") && is(3, "(");
    cfg && (is(4, "test") && is(5, ")") || is(4, "all") && is(6, "test"))
}

fn after_attributes(all: &[Token], mut at: usize) -> usize {
    let is = |at: usize, text: &str| all.get(at).is_some_and(|token| token.is(text));
    while is(at, "#") && is(at + 1, "[") {
        at = after_group(all, at + 1);
    }
    at
}

/// Returns the index of the token after an item, a statement, a field or a variant. `begin` is the
/// index of its first token.
fn after_item(all: &[Token], begin: usize) -> usize {
    /// Keywords with which an item or a statement begins. A comma does not end an item or a
    /// statement, but ends a field or a variant.
    const ITEMS: &[&str] = &[
        "pub",
        "fn",
        "mod",
        "use",
        "struct",
        "enum",
        "union",
        "trait",
        "impl",
        "type",
        "const",
        "static",
        "async",
        "unsafe",
        "extern",
        "macro_rules",
        "let",
    ];
    /// Keywords of items that end at a semicolon, even if a pair of braces precedes the semicolon.
    const LINES: &[&str] = &["use", "type", "const", "static", "let"];
    let word = |at: usize| all.get(at).and_then(Token::word).unwrap_or_default();
    let mut first = begin;
    if word(first) == "pub" {
        first += 1;
        if all.get(first).is_some_and(|token| token.is("(")) {
            first = after_group(all, first);
        }
    }
    let is_item = ITEMS.contains(&word(begin));
    let is_line = LINES.contains(&word(first)) && word(first + 1) != "fn";
    let mut at = begin;
    while let Some(token) = all.get(at) {
        match &token.kind {
            Kind::Mark("{") => {
                at = after_group(all, at);
                if !is_line {
                    return at;
                }
            }
            Kind::Mark("(" | "[") => at = after_group(all, at),
            Kind::Mark("}" | ")" | "]") => return at,
            Kind::Mark(";") => return at + 1,
            Kind::Mark(",") if !is_item => return at + 1,
            _ => at += 1,
        }
    }
    all.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: &[Token]) -> String {
        let words = tokens.iter().map(|token| match &token.kind {
            Kind::Word(word) => word.clone(),
            Kind::Mark(mark) => (*mark).to_owned(),
            Kind::Other(other) => other.to_string(),
            Kind::Literal => "LITERAL".to_owned(),
            Kind::Lifetime => "LIFETIME".to_owned(),
        });
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_produce_no_tokens() {
        let source = "a /* use crate::x; /* nested */ still */ b // use crate::y;\n/// doc\nc";
        assert_eq!(text(&tokens(source)), "a b c");
    }

    #[test]
    fn the_content_of_a_literal_produces_no_tokens() {
        for literal in [
            r#""use crate::x; \" {""#,
            r##"r#"use crate::x; " {"#"##,
            r#"br"\""#,
            r#"b"{\"""#,
            r#"c"x""#,
            r"'{'",
            r"'\''",
            r"'\u{7d}'",
            r"b'{'",
            r"b'\\'",
            "0x1f_u8",
        ] {
            assert_eq!(text(&tokens(&format!("a {literal} b"))), "a LITERAL b");
        }
    }

    #[test]
    fn a_lifetime_does_not_begin_a_literal() {
        assert_eq!(
            text(&tokens("fn f<'a>(x: &'a str) -> Option<&'static str> {}")),
            "fn f < LIFETIME > ( x : & LIFETIME str ) - > Option < & LIFETIME str > { }"
        );
        assert_eq!(text(&tokens("'label: loop {}")), "LIFETIME : loop { }");
    }

    #[test]
    fn ranges_and_raw_names_are_split_into_tokens() {
        assert_eq!(text(&tokens("1..2")), "LITERAL . . LITERAL");
        assert_eq!(text(&tokens("r#type::x")), "type :: x");
    }

    #[test]
    fn line_breaks_in_strings_and_comments_are_counted() {
        let all = tokens("a\n\"x\ny\"\n/*\n*/ b");
        let lines: Vec<usize> = all.iter().map(|token| token.line).collect();
        assert_eq!(lines, [1, 2, 5]);
    }

    #[test]
    fn items_under_cfg_test_are_not_product_code() {
        let source = "
            fn a() {}
            #[cfg(test)]
            mod tests { use crate::x; fn t() { if true {} } }
            #[cfg(test)]
            pub(crate) fn only<A, B>(a: A) -> B { a }
            #[cfg(test)]
            const TABLE: &[Row] = &[Row { x: 1 }, Row { x: 2 }];
            #[cfg(all(test, target_os = \"linux\"))]
            #[path = \"elsewhere.rs\"]
            mod elsewhere;
            #[cfg(not(test))]
            fn b() {}
            struct S { #[cfg(test)] counter: u32, other: u32 }
        ";
        let product = product(&tokens(source));
        assert_eq!(
            text(&product.tokens),
            "fn a ( ) { } # [ cfg ( not ( test ) ) ] fn b ( ) { } struct S { other : u32 }"
        );
        assert_eq!(product.test_modules, ["elsewhere"]);
        assert_eq!(product.test_lines, 10);
    }
}
