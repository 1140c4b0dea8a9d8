//! A generator of classic BPF programs, which writes a program from its end to its beginning.
//!
//! A conditional jump reaches at most 255 instructions forward, and no jump can go backward. When
//! the generator writes a jump, it has already written the jump's target, because it writes
//! backward. If a target is too far away, the generator adds a stepping stone nearby. A stepping
//! stone is an unconditional jump to the target, or a copy of the return instruction. See the
//! kernel's Documentation/networking/filter.rst and seccomp_filter.rst.

use crate::sys::syscalls::SockFilter;

/// `BPF_MAXINSNS` of linux/bpf_common.h.
pub(crate) const INSTRUCTIONS_MAX: usize = 4096;

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
pub(crate) const NUMBER: u32 = 0;
pub(crate) const ARCHITECTURE: u32 = 4;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// The comparison of the accumulator with a constant in a conditional jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Test {
    Equal = 0x15,          // BPF_JMP | BPF_JEQ | BPF_K
    Greater = 0x25,        // BPF_JMP | BPF_JGT | BPF_K
    GreaterOrEqual = 0x35, // BPF_JMP | BPF_JGE | BPF_K
}

/// The position of an instruction in the program, counted from the end of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position(usize);

/// The goal of a jump: a return value of the filter, or a position in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// The filter returns this value: a `SECCOMP_RET_*` action with its data.
    Return(u32),
    At(Position),
}

/// A program that is being generated.
#[derive(Default)]
pub(crate) struct ProgramBuilder {
    /// The instructions in reverse order, beginning with the last instruction of the program.
    reversed: Vec<SockFilter>,
    /// The position of the newest stepping stone for each distant goal. A stepping stone is an
    /// instruction that jumps to the goal, or returns the goal's value.
    stones: Vec<(Goal, Position)>,
}

/// The largest distance that a conditional jump crosses without a new stepping stone. JUMP_MAX is
/// smaller than the maximum of 255, because a conditional jump has two goals. A new stepping stone
/// for one goal increases the distance to the other goal.
const JUMP_MAX: usize = 250;

impl ProgramBuilder {
    /// Returns whether the program already has more instructions than the kernel accepts. The
    /// builder then adds no further code, because the time for a stepping stone grows with the
    /// number of goals.
    fn is_too_long(&self) -> bool {
        self.reversed.len() > INSTRUCTIONS_MAX
    }

    fn push(&mut self, code: u16, if_true: u8, if_false: u8, value: u32) -> Position {
        self.reversed.push(SockFilter {
            code,
            if_true,
            if_false,
            value,
        });
        Position(self.reversed.len() - 1)
    }

    /// Returns the number of instructions between `place` and the instruction that is added next.
    fn distance(&self, place: Position) -> usize {
        self.reversed.len() - 1 - place.0
    }

    fn lay_stone(&mut self, goal: Goal) -> Position {
        let place = match goal {
            Goal::Return(answer) => self.push(RETURN, 0, 0, answer),
            Goal::At(place) => {
                let distance = self.distance(place) as u32;
                self.push(JUMP, 0, 0, distance)
            }
        };
        match self.stones.iter_mut().find(|(known, _)| *known == goal) {
            Some((_, stone)) => *stone = place,
            None => self.stones.push((goal, place)),
        }
        place
    }

    /// Returns a position that a conditional jump can reach. This position is the goal itself, or a
    /// nearby stepping stone that leads to the goal.
    fn reachable(&mut self, goal: Goal) -> Position {
        if let Goal::At(place) = goal
            && self.distance(place) <= JUMP_MAX
        {
            return place;
        }
        let stone = self.stones.iter().find(|(known, _)| *known == goal);
        match stone.map(|(_, stone)| *stone) {
            Some(stone) if self.distance(stone) <= JUMP_MAX => stone,
            _ => self.lay_stone(goal),
        }
    }

    /// Adds a conditional jump, which compares the accumulator with `value`. The jump leads to
    /// `if_true` if the comparison is true, and otherwise to `if_false`.
    pub(crate) fn branch(&mut self, test: Test, value: u32, if_true: Goal, if_false: Goal) -> Goal {
        if if_true == if_false || self.is_too_long() {
            return if_true;
        }
        let (if_true, if_false) = (self.reachable(if_true), self.reachable(if_false));
        // Each distance fits into a u8. The distance is at most JUMP_MAX, or JUMP_MAX + 1 if the
        // other goal needed a new stepping stone.
        let (if_true, if_false) = (self.distance(if_true), self.distance(if_false));
        Goal::At(self.push(test as u16, if_true as u8, if_false as u8, value))
    }

    /// Makes sure that the program continues at `goal` after the next added instruction.
    fn continue_at(&mut self, goal: Goal) {
        match goal {
            Goal::At(place) if self.reversed.len() == place.0 + 1 => {}
            goal => {
                self.lay_stone(goal);
            }
        }
    }

    /// Adds code that loads a word of `seccomp_data` into the accumulator, keeps only the bits in
    /// `mask`, and continues at `goal`.
    pub(crate) fn load(&mut self, offset: u32, mask: u32, goal: Goal) -> Goal {
        if self.is_too_long() {
            return goal;
        }
        self.continue_at(goal);
        if mask != u32::MAX {
            self.push(AND, 0, 0, mask);
        }
        Goal::At(self.push(LOAD, 0, 0, offset))
    }

    /// Returns the finished program, which begins at `goal`. Returns `None` if the program has more
    /// instructions than the kernel accepts.
    pub(crate) fn finish(mut self, goal: Goal) -> Option<Vec<SockFilter>> {
        self.continue_at(goal);
        self.reversed.reverse();
        (!self.is_too_long()).then_some(self.reversed)
    }
}

/// Interprets a filter program, and returns the filter's result for a system call.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn interpret(
    program: &[SockFilter],
    architecture: u32,
    number: u32,
    args: &[u64; 6],
) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(architecture.to_le_bytes());
    data.extend([0; 8]);
    args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let SockFilter {
            code,
            if_true,
            if_false,
            value,
        } = program[at];
        at += 1;
        let mut branch = |holds: bool| at += usize::from(if holds { if_true } else { if_false });
        match code {
            LOAD => {
                let word = &data[value as usize..value as usize + 4];
                accumulator = u32::from_le_bytes(word.try_into().unwrap());
            }
            AND => accumulator &= value,
            JUMP => at += value as usize,
            RETURN => return value,
            0x15 => branch(accumulator == value),
            0x25 => branch(accumulator > value),
            0x35 => branch(accumulator >= value),
            other => panic!("the filter contains the unexpected instruction {other:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distant_goals_are_reached_over_stepping_stones() {
        let mut program = ProgramBuilder::default();
        let mut goal = Goal::Return(0);
        for number in 0..2000 {
            goal = program.branch(Test::Equal, number, Goal::Return(number + 7), goal);
        }
        let start = program.load(NUMBER, u32::MAX, goal);
        // This jump crosses the whole program.
        let far = program.branch(Test::Equal, 1, Goal::Return(7), start);
        let far = program.load(ARCHITECTURE, u32::MAX, far);
        let program = program.finish(far).unwrap();
        for number in [0, 1, 255, 256, 1999] {
            assert_eq!(interpret(&program, 0, number, &[0; 6]), number + 7);
        }
        assert_eq!(interpret(&program, 0, 2000, &[0; 6]), 0);
        assert_eq!(interpret(&program, 1, 1999, &[0; 6]), 7);
    }

    #[test]
    fn the_builder_adds_no_code_to_a_program_that_is_too_long() {
        let mut program = ProgramBuilder::default();
        let mut goal = Goal::Return(0);
        for number in 0..1_000_000 {
            let test = program.branch(Test::Equal, number, Goal::Return(number + 7), goal);
            goal = program.load(16, u32::MAX, test);
        }
        assert!(program.reversed.len() < INSTRUCTIONS_MAX + 10);
        assert!(program.finish(goal).is_none());
    }

    #[test]
    fn a_packed_instruction_unpacks_to_the_same_instruction() {
        let instruction = SockFilter {
            code: 0x15,
            if_true: 255,
            if_false: 1,
            value: 0xdead_beef,
        };
        assert_eq!(SockFilter::unpack(instruction.pack()), instruction);
    }
}
